"""The engine: a thread that plans a step, computes it and tells what came of it, over and over.

The lock guards scheduler and pool and is never held while a model computes, so that calls return at once. What a call cannot
do between two steps (abort, export of a running request) it leaves as a command for the next one.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many

import msgspec
import numpy as np
import torch

from cluster.errors import InvalidConfig, InvalidRequest, Overloaded, Unreachable
from cluster.handoff import RequestState, Token
from cluster.kv import BLOCK_TOKENS, KvEvent, KvLayout, KvNamespace, block_hashes, blocks_for
from cluster.performance import PerformanceModel
from cluster.request import Request
from workers.engines.block_pool import BlockPool
from workers.engines.detokenizer import Detokenizer
from workers.engines.engine import EngineCapabilities, EngineLimits, EngineLoad, KvExport, KvImport, Sink, StepOutput, Submission
from workers.engines.torch_engine.attention import Span, StepAttention
from workers.engines.torch_engine.handover import PromptExport, ReservedImport
from workers.engines.torch_engine.kv_tensors import KvTensors
from workers.engines.torch_engine.loading import load
from workers.engines.torch_engine.pacing import Pacer, StepShape, fitted, shape_of
from workers.engines.torch_engine.sampling import Drawn, SamplerState, draw
from workers.engines.torch_engine.scheduler import Scheduler, Work
from workers.engines.torch_engine.sequence import Sequence

log = logging.getLogger(__name__)

MAX_WAITING = 1024  # Requests; a gateway that has more to send should look for another replica.
STEP_WINDOW = 32  # Steps over which `step_s` is averaged: a second or so of decoding.
STOP_WAIT_S = 30.0  # Longer than any step; a thread that does not end by then is left behind as a daemon.
WARM_CONTEXTS = (64, 256)
WARM_BATCHES = (1, 4, 16)
WARM_PROMPTS = (16, 64, 256, 512)
WARM_ROUNDS = 3


class TorchEngine:
    """`Engine` over a `transformers` checkpoint directory. Limits and layout are known after `start`."""

    capabilities = EngineCapabilities(kv_blocks=True, transfer_params=False, live_export=True, block_events=True, logprobs=True)
    limits: EngineLimits
    layout: KvLayout | None = None

    def __init__(
        self,
        *,
        path: str,
        model: str,
        revision: str = "",
        kv_blocks: int,
        block_tokens: int = BLOCK_TOKENS,
        max_running: int = 64,
        step_budget_tokens: int = 512,
        threads: int = 1,
        device: str = "cpu",
        dtype: str = "float32",
        pace: PerformanceModel | None = None,
    ) -> None:
        for name, value in {
            "kv_blocks": kv_blocks,
            "block_tokens": block_tokens,
            "max_running": max_running,
            "step_budget_tokens": step_budget_tokens,
            "threads": threads,
        }.items():
            if value < 1:
                raise InvalidConfig(f"{name} {value} below 1, engine of {model}")
        self.performance = pace or PerformanceModel(step_s=0.0, prefill_token_s=0.0)
        self._path = path
        self._namespace = KvNamespace(model=model, revision=revision, dtype=dtype, block_tokens=block_tokens)
        self._device = torch.device(device)
        self._threads = threads
        self._pool = BlockPool(kv_blocks, block_tokens)
        self._scheduler = Scheduler(self._pool, max_running=max_running, step_budget_tokens=step_budget_tokens)
        self._step_budget_tokens = step_budget_tokens
        self._pacer = Pacer(pace) if pace is not None else None

        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._anything_new = False
        self._stepping = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._order = itertools.count()
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._commands: list[Callable[[], None]] = []
        self._outbox: list[Token] = []
        self._handed_over: list[Callable[[], None]] = []

        self._slowness = 1.0
        self._durations_s: deque[float] = deque(maxlen=STEP_WINDOW)
        self._predicted_s: deque[float] = deque(maxlen=STEP_WINDOW)
        self._power_w = self.performance.idle_w
        self._steps = self._prompt_tokens = self._output_tokens = 0

    # Life.

    def start(self, sink: Sink) -> None:
        self.open(sink)
        self._thread = threading.Thread(target=self._run, name=f"engine {self._namespace.model}", daemon=True)
        self._thread.start()

    def open(self, sink: Sink) -> None:
        """`start` without the thread: the caller steps."""
        torch.set_num_threads(self._threads)
        checkpoint = load(self._path, block_tokens=self._namespace.block_tokens, dtype=self._namespace.dtype, device=self._device)
        self._kv = KvTensors(checkpoint.layout, self._pool.blocks, self._device)
        self._model, self._tokenizer, self._eos_ids = checkpoint.model, checkpoint.tokenizer, checkpoint.eos_ids
        self._sink = sink
        self.layout = checkpoint.layout
        self.limits = EngineLimits(
            context_tokens=checkpoint.context_tokens,
            kv_blocks=self._pool.blocks,
            block_tokens=self._pool.block_tokens,
            max_running=self._scheduler.max_running,
            step_budget_tokens=self._step_budget_tokens,
            vocabulary=checkpoint.vocabulary,
        )

    def warm(self) -> None:
        torch.set_num_threads(self._threads)
        with self._stepping:
            largest = max(min(self._step_budget_tokens, max(WARM_PROMPTS)), *WARM_CONTEXTS)
            with self._lock:
                blocks = self._pool.allocate(min(blocks_for(largest, self._pool.block_tokens), self._pool.available)) or []
            try:
                measured = self._measure(blocks)
            finally:
                with self._lock:
                    self._pool.release(blocks)
        if self._pacer is None and measured:
            self.performance = fitted(measured)

    def stop(self) -> None:
        with self._lock:
            self._stopped.set()
            self._wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(STOP_WAIT_S)
            self._thread = None
        elif self._thread is None:
            self._fail_everything()
        self._model = self._kv = None

    @property
    def alive(self) -> bool:
        return not self._stopped.is_set()

    # Calls, from any thread.

    def submit(self, submission: Submission) -> None:
        self._enqueue(submission, None)

    def prefill(self, submission: Submission, skip_tokens: int, export: KvExport) -> None:
        self._enqueue(submission, PromptExport(export, skip_tokens))

    def reserve(self, submission: Submission) -> KvImport | None:
        self._check(submission)
        tokens = [*submission.request.prompt, *submission.generated]
        digests = block_hashes(tokens, self._namespace_of(submission.request))
        with self._lock:
            self._refuse_when_stopped()
            if self._scheduler.full:
                return None
            found = self._pool.match(digests, tokens)[: len(submission.request.prompt) // self._pool.block_tokens]
            self._pool.hold(found)
            blocks = self._pool.allocate(blocks_for(len(tokens), self._pool.block_tokens) - len(found))
            if blocks is None:
                self._pool.release(found)
                return None
            self._scheduler.reserved += 1
        cached_tokens = len(found) * self._pool.block_tokens
        reserved_s = time.monotonic()
        return ReservedImport(
            submission,
            blocks=found + blocks,
            cached_tokens=cached_tokens,
            kv=self._kv,
            grow=self._grow_reservation,
            adopt=lambda state, attempt, held: self._adopt(state, attempt, held, len(found), reserved_s),
            release=self._release_reservation,
        )

    def export_running(self, request_id: str, attempt: int, export: KvExport) -> None:
        self._command(lambda: self._hand_over_running(request_id, attempt, PromptExport(export)))

    def abort(self, request_id: str, attempt: int | None = None) -> None:
        self._command(lambda: self._abort(request_id, attempt))

    def abandon(self, error: str) -> None:
        self._command(lambda: self._fail_all(error))

    def slow(self, factor: float) -> None:
        self._slowness = factor

    def load(self) -> EngineLoad:
        with self._lock:
            scheduler = self._scheduler
            decoding = [sequence for sequence in scheduler.running if sequence.decoding]
            begun = [sequence for sequence in scheduler.running if not sequence.decoding]
            busy = bool(scheduler.running)
            return EngineLoad(
                running=len(decoding),
                waiting=len(begun) + len(scheduler.waiting),
                waiting_tokens=sum(sequence.missing for sequence in itertools.chain(begun, scheduler.waiting)),
                kv_tokens=sum(sequence.computed for sequence in decoding),
                kv_blocks_used=self._pool.used,
                kv_blocks_cached=self._pool.cached,
                step_s=sum(self._durations_s) / len(self._durations_s) if self._durations_s else 0.0,
                slowdown=sum(self._durations_s) / predicted_s if (predicted_s := sum(self._predicted_s)) else 1.0,
                power_w=self._power_w if busy else self.performance.idle_w,
                steps=self._steps,
                overrun_steps=self._pacer.overruns if self._pacer else 0,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=scheduler.cached_tokens,
                output_tokens=self._output_tokens,
                preemptions=scheduler.preemptions,
            )

    def cached_blocks(self) -> tuple[KvEvent, ...]:
        with self._lock:
            return self._pool.picture()

    # The step.

    def step(self) -> bool:
        """Carry out commands, compute one step, tell what came of it. False: there was nothing to do."""
        with self._stepping:
            began_s = time.monotonic()
            with self._lock:
                self._anything_new = False
                commands, self._commands = self._commands, []
                for command in commands:
                    command()
                self._end_late(began_s)
                works = self._scheduler.plan(began_s)
            if works:
                self._compute(works, began_s)
            elif self._pacer is not None:
                self._pacer.rest()
            return self._tell() or bool(works)

    def _compute(self, works: list[Work], began_s: float) -> None:
        spans = [work.sequence.span(work.count) for work in works]
        shape = shape_of(spans)
        try:
            drawn = self._forward(works, spans)
        except Exception as error:
            log.exception("a step of %d sequences failed", len(works))
            if len(works) > 1:
                # Whose fault it was fails alone; what the others have written is written again.
                for work in works:
                    self._compute([work], began_s)
                return
            with self._lock:
                self._fail(works[0].sequence, f"the engine's step failed: {error!r}")
            return
        if self._pacer is not None:
            self._pacer.hold(shape, began_s, self._stopped)
        if self._slowness > 1.0:
            self._stopped.wait((self._slowness - 1.0) * (time.monotonic() - began_s))
        now_s = time.monotonic()
        with self._lock:
            self._steps += 1
            self._prompt_tokens += sum(work.count for work in works if not work.sequence.decoding)
            self._durations_s.append(now_s - began_s)
            self._predicted_s.append(self.performance.step_time_s(*shape))
            self._power_w = self.performance.power_w(*shape)
            self._settle(works, drawn, now_s)

    def _forward(self, works: list[Work], spans: list[Span]) -> list[Drawn | None]:
        """Tokens for the works that reach the end of their sequence, in order."""
        ids: list[int] = []
        for work in works:
            ids += work.sequence.tokens[work.sequence.computed : work.sequence.computed + work.count]
        ending = [work.sequence for work in works if work.count == work.sequence.missing]
        row, rows = -1, []
        for work in works:
            row += work.count
            if work.count == work.sequence.missing:
                rows.append(row)
        exports = [(work.sequence.export, span) for work, span in zip(works, spans, strict=True) if work.sequence.export]

        def on_layer(layer: int) -> None:
            for export, span in exports:
                export.send_layer(self._kv, layer, span)

        with torch.inference_mode():
            logits = self._logits(ids, StepAttention(self._kv, spans, on_layer if exports else None), rows)
            return draw(logits, [sequence.sampler for sequence in ending]) if ending else []

    def _logits(self, ids: list[int], attention: StepAttention, rows: list[int]) -> torch.Tensor:
        """One forward over all tokens of a step; float32 logits after the given rows, [rows, vocabulary]."""
        wanted = 0 if len(rows) == len(ids) else torch.tensor(rows, dtype=torch.long, device=self._device)
        output = self._model(
            input_ids=torch.tensor([ids], device=self._device),
            position_ids=torch.from_numpy(attention.positions).unsqueeze(0).to(self._device),
            use_cache=False,
            logits_to_keep=wanted,
            paged_step=attention,
        )
        return output.logits[0].float()

    def _settle(self, works: list[Work], drawn: list[Drawn | None], now_s: float) -> None:
        tokens = iter(drawn)
        for work in works:
            sequence = work.sequence
            ending = work.count == sequence.missing
            token = next(tokens) if ending else None
            if ending and token is None:
                place = f"token {len(sequence.generated)} of request {sequence.request.request_id}"
                self._fail(sequence, f"{self._namespace.model} computes no finite logits for {place}", retry=False)
                continue
            self._scheduler.computed(work)
            if sequence.export is not None:
                sequence.export.sent_until(sequence.computed)
            if token is not None:
                self._take(sequence, sequence.append(token, now_s))
            elif sequence.export is not None and sequence.export.failure is not None:
                self._fail(sequence, sequence.export.failure)

    def _take(self, sequence: Sequence, token: Token) -> None:
        self._output_tokens += 1
        if sequence.export is not None:
            state = RequestState(request=sequence.request, generated=sequence.generated, first=token)
            self._hand_over(lambda: sequence.export.finish(state))
            self._drop(sequence)
            return
        self._outbox.append(token)
        if token.finish is not None:
            self._drop(sequence)

    def _tell(self) -> bool:
        with self._lock:
            tokens, self._outbox = self._outbox, []
            events = self._pool.take_events()
            handed_over, self._handed_over = self._handed_over, []
        if tokens or events:
            self._say(tuple(tokens), events)
        for tell in handed_over:
            tell()
        return bool(tokens or events or handed_over)

    def _say(self, tokens: tuple[Token, ...], events: tuple[KvEvent, ...]) -> None:
        try:
            self._sink(StepOutput(tokens=tokens, kv_events=events))
        except Exception:
            log.exception("the sink refused %d tokens", len(tokens))

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while not self._stopped.is_set():
                if not self.step():
                    with self._lock:
                        self._changed.wait_for(lambda: self._anything_new)
        except Exception:
            # The books of blocks and requests may be wrong now: end, and let the requests be served elsewhere.
            log.exception("the engine of %s ends", self._namespace.model)
        finally:
            self._stopped.set()
            self._fail_everything()

    # Under the lock.

    def _wake(self) -> None:
        self._anything_new = True
        self._changed.notify_all()

    def _command(self, command: Callable[[], None]) -> None:
        with self._lock:
            self._commands.append(command)
            self._wake()

    def _hand_over(self, tell: Callable[[], None]) -> None:
        """Leave a word for an export, to be said without the lock."""
        self._handed_over.append(tell)

    def _drop(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.key]

    def _fail(self, sequence: Sequence, error: str, *, finish: str = "error", retry: bool = True) -> None:
        self._drop(sequence)
        export = sequence.export
        if export is not None:
            self._hand_over(lambda: export.fail(error, retry))
        else:
            self._outbox.append(sequence.ended(finish, error=error if finish == "error" else None, retry=retry))

    def _fail_everything(self) -> None:
        with self._lock:
            for command in self._commands:
                command()
            self._commands.clear()
            self._fail_all("the engine stopped")
        self._tell()

    def _fail_all(self, error: str) -> None:
        for sequence in list(self._sequences.values()):
            self._fail(sequence, error)

    def _abort(self, request_id: str, attempt: int | None) -> None:
        for key, sequence in list(self._sequences.items()):
            if key[0] == request_id and attempt in (None, key[1]):
                self._fail(sequence, "aborted", finish="abort", retry=False)

    def _end_late(self, now_s: float) -> None:
        for sequence in [each for each in (*self._scheduler.running, *self._scheduler.waiting) if each.late(now_s)]:
            late_s = now_s - sequence.due_s
            self._fail(sequence, f"request {sequence.request.request_id} is {late_s:.1f} s past its deadline", retry=False)

    def _hand_over_running(self, request_id: str, attempt: int, export: PromptExport) -> None:
        sequence = self._sequences.get((request_id, attempt))
        if sequence is None or not sequence.decoding:
            place = "is not here" if sequence is None else "is not decoding"
            self._hand_over(lambda: export.fail(f"request {request_id} attempt {attempt} {place}", retry=True))
            return
        span = Span(sequence.span(1).table, 0, sequence.computed)
        with torch.inference_mode():
            export.send_all(self._kv, span)
        state = RequestState(request=sequence.request, generated=sequence.generated)
        self._hand_over(lambda: export.finish(state))
        self._drop(sequence)

    # Coming in.

    def _enqueue(self, submission: Submission, export: PromptExport | None) -> None:
        self._check(submission)
        sequence = self._sequence(submission.request, submission.attempt, submission.generated, export)
        with self._lock:
            self._refuse_when_stopped()
            if len(self._scheduler.waiting) >= MAX_WAITING:
                raise Overloaded(f"{MAX_WAITING} requests wait already for {self._namespace.model}")
            self._register(sequence)
            self._scheduler.enqueue(sequence)
            self._wake()

    def _sequence(self, request: Request, attempt: int, generated: tuple[int, ...], export: PromptExport | None = None) -> Sequence:
        return Sequence(
            request,
            attempt=attempt,
            order=next(self._order),
            generated=generated,
            namespace=self._namespace_of(request),
            sampler=SamplerState(request.sampling, request.prompt, generated, self.limits.vocabulary, self._eos_ids),
            detokenizer=Detokenizer(self._tokenizer, request.sampling, self._eos_ids, generated),
            now_s=time.monotonic(),
            export=export,
        )

    def _register(self, sequence: Sequence) -> None:
        if sequence.key in self._sequences:
            raise InvalidRequest(f"request {sequence.key[0]} attempt {sequence.key[1]} is here already", param="request_id")
        self._sequences[sequence.key] = sequence

    def _refuse_when_stopped(self) -> None:
        if self._stopped.is_set():
            raise Unreachable(f"the engine of {self._namespace.model} has stopped")

    def _namespace_of(self, request: Request) -> KvNamespace:
        return msgspec.structs.replace(self._namespace, salt=request.salt)

    def _check(self, submission: Submission) -> None:
        request, limits, model = submission.request, self.limits, self._namespace.model
        request.sampling.check()
        tokens, longest = request.prompt + submission.generated, request.sampling.max_tokens
        if not request.prompt:
            raise InvalidRequest(f"an empty prompt for {model}", param="prompt")
        if (worst := max(tokens)) >= limits.vocabulary or (worst := min(tokens)) < 0:
            raise InvalidRequest(f"token id {worst} outside [0, {limits.vocabulary}), the vocabulary of {model}", param="prompt")
        if len(submission.generated) >= longest:
            raise InvalidRequest(f"{len(submission.generated)} tokens generated already, max_tokens {longest}", param="max_tokens")
        if len(request.prompt) + longest > limits.context_tokens:
            raise InvalidRequest(
                f"prompt {len(request.prompt)} plus max_tokens {longest} above {limits.context_tokens}, the context of {model}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        blocks = blocks_for(len(request.prompt) + longest - 1, limits.block_tokens)
        if blocks > limits.kv_blocks:
            raise InvalidRequest(
                f"prompt {len(request.prompt)} plus max_tokens {longest} take {blocks} blocks, above the pool's {limits.kv_blocks}",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def _grow_reservation(self, count: int) -> list[int]:
        with self._lock:
            blocks = self._pool.allocate(count)
            if blocks is None:
                raise Overloaded(f"{count} more blocks for KV that arrives, {self._pool.available} free")
            return blocks

    def _release_reservation(self, blocks: list[int]) -> None:
        with self._lock:
            self._pool.release(blocks)
            self._scheduler.reserved -= 1
            self._wake()

    def _adopt(self, state: RequestState, attempt: int, blocks: list[int], found: int, reserved_s: float) -> None:
        """Run a request whose KV is here."""
        sequence = self._sequence(state.request, attempt, state.generated)
        transfer_s = time.monotonic() - reserved_s
        with self._lock:
            self._refuse_when_stopped()
        if state.first is not None:
            # At once, and not after the step under way: it is there, and the engine cannot have said more of this request yet.
            self._say((_as_shown_here(state.first, attempt, transfer_s),), ())
        with self._lock:
            self._refuse_when_stopped()
            self._register(sequence)
            sequence.take(blocks)
            sequence.shared_blocks = found
            if filled := state.kv_tokens % self._pool.block_tokens:
                self._kv.blank(blocks[state.kv_tokens // self._pool.block_tokens], filled)
            self._scheduler.reserved -= 1
            self._scheduler.adopt(sequence)
            self._scheduler.computed(Work(sequence, state.kv_tokens))
            if state.first is not None and state.first.finish is not None:
                self._drop(sequence)
            self._wake()

    # Warming.

    def _measure(self, blocks: Many[int]) -> list[tuple[StepShape, float]]:
        """Shapes of small steps over some blocks, with the least of a few durations each."""
        table = np.array(blocks, dtype=np.int64)
        room = len(blocks) * self._pool.block_tokens
        steps = [[Span(table, 0, count)] for count in WARM_PROMPTS if 1 < count <= min(room, self._step_budget_tokens)]
        steps += [[Span(table, 64, count)] for count in WARM_PROMPTS if count + 64 <= room and count <= self._step_budget_tokens]
        steps += [
            [Span(table, context - 1, 1)] * batch
            for context in WARM_CONTEXTS
            for batch in WARM_BATCHES
            if context <= room and batch <= self._scheduler.max_running
        ]
        return [(shape_of(spans), min(self._timed_s(spans) for _ in range(WARM_ROUNDS))) for spans in steps]

    def _timed_s(self, spans: list[Span]) -> float:
        began_s = time.perf_counter()
        rows = np.cumsum([span.count for span in spans]) - 1
        with torch.inference_mode():
            logits = self._logits([0] * int(rows[-1] + 1), StepAttention(self._kv, spans), rows.tolist())
            logits.argmax(dim=-1).tolist()
        return time.perf_counter() - began_s


def _as_shown_here(first: Token, attempt: int, transfer_s: float) -> Token:
    """The first token with this side's attempt, and with what of the wait was neither queue nor prefill."""
    times = None
    if first.times is not None:
        queue_s, prefill_s, _ = first.times
        times = (queue_s, prefill_s, max(transfer_s - queue_s - prefill_s, 0.0))
    return msgspec.structs.replace(first, attempt=attempt, times=times)
