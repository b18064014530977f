"""An engine without a model: real requests, batches, blocks, prefix cache and transfers; time and watts from a PerformanceModel.

What it generates is no language: tokens are a function of prompt, seed and position, the same on every replica, so that a
stream resumed elsewhere goes on token for token. They come from the whole vocabulary but special tokens, so a request runs to
`max_tokens` unless its own stop strings or stop token ids end it. Sampling parameters but the seed change nothing, penalties
among them; log-probabilities, which a client would read, are refused. KV that it sends has the right shape and size, and zeros
inside.

Batching is that of the torch engine: every decoding request first, then prompts in chunks, within a budget of tokens a step
(Sarathi-Serve, OSDI'24); without a free block the newest request of the lowest priority goes back to be computed again.
"""

from __future__ import annotations

import logging
import threading
from bisect import insort
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from cluster.errors import InvalidRequest, Overloaded, Unreachable
from cluster.handoff import RequestState, Token
from cluster.kv import BLOCK_TOKENS, KvEvent, KvLayout, KvNamespace, blocks_for
from cluster.performance import PerformanceModel, causal_pairs
from workers.engines.block_pool import BlockPool
from workers.engines.emulated_kv import ReservedImport, Sender
from workers.engines.emulated_request import Sequence, Vocabulary, rank_of
from workers.engines.engine import EngineCapabilities, EngineLimits, EngineLoad, KvExport, KvImport, Sink, StepOutput, Submission
from workers.engines.step_driver import Driver

log = logging.getLogger(__name__)

MAX_WAITING = 1024  # Far beyond what a gateway queues for one replica; a guard against a caller that does not look.
SMOOTHING = 1 / 16  # Weight of the newest step in the mean step time.


class EmulatedEngine:
    """Implements `workers.engines.engine.Engine`. Runs on `driver`, which many engines share.

    tokenizer_path: a tokenizer.json; its ids are taken even where they are above `vocabulary`. Without one token 17 reads " 17".
    layout: without one it neither exports nor imports KV.
    """

    def __init__(
        self,
        *,
        model: str,
        performance: PerformanceModel,
        kv_blocks: int,
        context_tokens: int,
        vocabulary: int,
        driver: Driver,
        revision: str = "",
        block_tokens: int = BLOCK_TOKENS,
        max_running: int = 64,
        step_budget_tokens: int = 512,
        layout: KvLayout | None = None,
        tokenizer_path: str | None = None,
    ) -> None:
        self.performance = performance
        self.layout = layout
        self.capabilities = EngineCapabilities(
            kv_blocks=layout is not None,
            transfer_params=False,
            live_export=layout is not None,
            block_events=True,
            logprobs=False,
        )
        self._vocabulary = Vocabulary(vocabulary, tokenizer_path)
        self.limits = EngineLimits(
            context_tokens=context_tokens,
            kv_blocks=kv_blocks,
            block_tokens=block_tokens,
            max_running=max_running,
            step_budget_tokens=step_budget_tokens,
            vocabulary=self._vocabulary.size,
        )
        self.model = model
        dtype = layout.dtype if layout else "float32"
        self._namespace = KvNamespace(model=model, revision=revision, dtype=dtype, block_tokens=block_tokens)
        self._driver = driver
        self._lock = threading.Lock()
        self._pool = BlockPool(kv_blocks, block_tokens)
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._waiting: list[Sequence] = []
        self._prefilling: list[Sequence] = []
        self._decoding: list[Sequence] = []
        self._places = min(max_running, step_budget_tokens)  # With more decodes than budget a prompt would never get its turn.
        self._reserved = 0
        self._order = 0
        self._said: list[Token] = []
        self._later: list[Callable[[], None]] = []
        self._step: _Step | None = None
        self._awake = False
        self._stopped = False
        self._sink: Sink = _nobody
        self._step_s = 0.0
        self._slowness = 1.0
        self._steps = self._overruns = self._prompt_tokens = self._cached_tokens = self._output_tokens = self._preemptions = 0

    @property
    def alive(self) -> bool:
        return not self._stopped

    # ── what callers ask, from any thread ──

    def start(self, sink: Sink) -> None:
        self._sink = sink

    def warm(self) -> None:
        """Nothing is slow the first time, and performance is given."""

    def submit(self, submission: Submission) -> None:
        self._enqueue(self._sequence(submission))

    def prefill(self, submission: Submission, skip_tokens: int, export: KvExport) -> None:
        self._enqueue(self._sequence(submission, Sender(export, self._layout(), skip_tokens)))

    def reserve(self, submission: Submission) -> KvImport | None:
        layout = self._layout()
        sequence = self._sequence(submission)
        with self._lock:
            self._refuse_when_stopped()
            if not self._room() or not self._place(sequence, len(sequence.request.prompt)):
                return None
            self._reserved += 1
        return ReservedImport(
            submission,
            layout,
            sequence.computed,
            adopt=lambda state, attempt: self._adopt(sequence, state, attempt),
            release=lambda: self._forget(sequence),
        )

    def export_running(self, request_id: str, attempt: int, export: KvExport) -> None:
        sender = Sender(export, self._layout())
        with self._lock:
            sequence = self._sequences.get((request_id, attempt))
            if sequence is None or sequence not in self._decoding:
                self._later.append(lambda: sender.fail(f"request {request_id} attempt {attempt} is not decoding here", retry=True))
            else:
                self._remove(sequence)
                state, end = RequestState(request=sequence.request, generated=sequence.generated), sequence.computed
                self._later += (lambda: sender.send_until(end), lambda: sender.finish(state))
        self._driver.call_at(self._driver.clock(), self._flush)

    def abort(self, request_id: str, attempt: int | None = None) -> None:
        with self._lock:
            for key, sequence in list(self._sequences.items()):
                if key[0] == request_id and attempt in (None, key[1]):
                    self._fail(sequence, "aborted", finish="abort", retry=False)
        self._driver.call_at(self._driver.clock(), self._flush)

    def abandon(self, error: str) -> None:
        with self._lock:
            for sequence in list(self._sequences.values()):
                self._fail(sequence, error)
        self._driver.call_at(self._driver.clock(), self._flush)

    def slow(self, factor: float) -> None:
        self._slowness = factor

    def load(self) -> EngineLoad:
        with self._lock:
            prompts = (*self._waiting, *self._prefilling)
            return EngineLoad(
                running=len(self._decoding),
                waiting=len(prompts),
                waiting_tokens=sum(len(sequence.tokens) - sequence.computed for sequence in prompts),
                kv_tokens=sum(len(sequence.tokens) for sequence in self._decoding),
                kv_blocks_used=self._pool.used,
                kv_blocks_cached=self._pool.cached,
                step_s=self._step_s,
                slowdown=self._slowness,
                power_w=self.performance.idle_w if self._step is None else self._step.power_w,
                steps=self._steps,
                overrun_steps=self._overruns,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                output_tokens=self._output_tokens,
                preemptions=self._preemptions,
            )

    def cached_blocks(self) -> tuple[KvEvent, ...]:
        with self._lock:
            return self._pool.picture()

    def stop(self) -> None:
        """Ends what runs at once, from the caller's thread: the driver may be gone."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            for sequence in list(self._sequences.values()):
                self._fail(sequence, "the engine stopped")
            self._step = None
        self._flush()

    # ── steps, on the driver's thread ──

    def _turn(self) -> None:
        try:
            self._next_step()
        except Exception:
            # The books of blocks and requests may be wrong now: end, and let the requests be served elsewhere.
            log.exception("the emulated engine of %s ends", self.model)
            self.stop()

    def _next_step(self) -> None:
        """The step under way is over: say what it made, and begin the next."""
        with self._lock:
            if self._stopped:
                return
            now_s, start_s = self._driver.clock(), self._driver.clock()
            step = self._step
            if step is not None:
                self._complete(step, now_s)
                # A late wake-up shortens the next step instead of adding up, unless a whole step was missed.
                if now_s - step.end_s <= step.lasting_s:
                    start_s = step.end_s
                elif step.lasting_s > 0.0:
                    self._overruns += 1
            self._end_late(now_s)
            self._step = step = self._plan(start_s)
            self._awake = step is not None
        self._flush()
        if step is not None:
            self._driver.call_at(step.end_s, self._turn)

    def _plan(self, now_s: float) -> _Step | None:
        decodes = self._decodes()
        budget = self.limits.step_budget_tokens - len(decodes)
        chunks: list[_Chunk] = []
        for sequence in self._prefilling:
            budget = _take(chunks, sequence, budget)
        while budget > 0 and self._waiting and self._room() and self._place(self._waiting[0], len(self._waiting[0].tokens) - 1):
            sequence = self._waiting.pop(0)
            insort(self._prefilling, sequence, key=rank_of)
            if sequence.started_s is None:
                sequence.started_s, sequence.cached_tokens = now_s, sequence.computed
                self._cached_tokens += sequence.computed
            budget = _take(chunks, sequence, budget)
        if not decodes and not chunks:
            return None
        features = (
            sum(chunk.count for chunk in chunks),
            sum(causal_pairs(chunk.sequence.computed, chunk.count) for chunk in chunks),
            len(decodes),
            sum([len(sequence.tokens) for sequence in decodes]),
        )
        lasting_s = self._slowness * self.performance.step_time_s(*features)
        return _Step(decodes, chunks, lasting_s, now_s + lasting_s, self.performance.power_w(*features))

    def _end_late(self, now_s: float) -> None:
        for sequence in [each for each in (*self._prefilling, *self._waiting) if each.late(now_s)]:
            late_s = now_s - sequence.due_s
            self._fail(sequence, f"request {sequence.key[0]} is {late_s:.1f} s past its deadline", retry=False)

    def _room(self) -> bool:
        return len(self._decoding) + len(self._prefilling) + self._reserved < self._places

    def _decodes(self) -> list[Sequence]:
        """The decoding requests, each with a block for its next token's KV. Preempts where there is none."""
        for sequence in self._decoding[:]:
            while sequence.computed >= sequence.held_tokens and not sequence.preempted:
                blocks = self._pool.allocate(1)
                if blocks is None:
                    self._preempt(max((*self._decoding, *self._prefilling), key=rank_of))
                else:
                    self._hold(sequence, blocks)
        return self._decoding[:]

    def _preempt(self, victim: Sequence) -> None:
        self._take_out(victim)
        victim.preempted = True
        victim.computed = victim.shared_blocks = 0
        self._preemptions += 1
        insort(self._waiting, victim, key=rank_of)

    def _place(self, sequence: Sequence, shareable_tokens: int) -> bool:
        """Take blocks for all its tokens, shared ones where its prefix is cached. False: there are not enough.

        shareable_tokens: at least one token is left to be computed here, for the step that makes the next one.
        """
        found = self._pool.match(sequence.hashes_of(shareable_tokens // self._pool.block_tokens), sequence.tokens)
        needed = blocks_for(len(sequence.tokens), self._pool.block_tokens) - len(found)
        # One that was preempted comes back only with room for the others to grow, else it would go again at once.
        spare = len(self._decoding) if sequence.preempted else 0
        if needed + spare + self._pool.unheld(found) > self._pool.available:
            return False
        self._pool.hold(found)
        blocks = self._pool.allocate(needed)
        assert blocks is not None, f"{needed} blocks counted as available are not"
        self._hold(sequence, found + blocks)
        sequence.preempted = False
        sequence.computed = len(found) * self._pool.block_tokens
        sequence.shared_blocks = len(found)
        return True

    def _hold(self, sequence: Sequence, blocks: list[int]) -> None:
        sequence.blocks += blocks
        sequence.held_tokens = len(sequence.blocks) * self._pool.block_tokens

    def _complete(self, step: _Step, now_s: float) -> None:
        self._steps += 1
        weight = SMOOTHING if self._step_s else 1.0
        self._step_s += weight * (step.lasting_s - self._step_s)
        block_tokens = self._pool.block_tokens
        for sequence in step.decodes:
            if not sequence.removed:
                sequence.computed += 1
                if sequence.computed % block_tokens == 0:
                    self._share(sequence)
                self._say(sequence, sequence.next_token())
        for sequence, count in step.chunks:
            if not sequence.removed:
                sequence.computed += count
                self._prompt_tokens += count
                self._share(sequence)
                self._chunk_done(sequence, now_s)

    def _chunk_done(self, sequence: Sequence, now_s: float) -> None:
        sender, end = sequence.sender, sequence.computed
        if sender is not None:
            self._later.append(lambda: sender.send_until(end))
        if end < len(sequence.tokens):
            return
        token = self._first_token(sequence, now_s)
        if sender is not None:
            self._remove(sequence)
            self._output_tokens += 1
            state = RequestState(request=sequence.request, generated=sequence.generated, first=token)
            self._later.append(lambda: sender.finish(state))
        else:
            self._prefilling.remove(sequence)
            insort(self._decoding, sequence, key=rank_of)
            self._say(sequence, token)

    def _first_token(self, sequence: Sequence, now_s: float) -> Token:
        token = sequence.next_token()
        if sequence.first_said or sequence.started_s is None:
            return token
        sequence.first_said = True
        times = (sequence.started_s - sequence.queued_s, now_s - sequence.started_s, 0.0)
        return msgspec.structs.replace(token, times=times, cached_tokens=sequence.cached_tokens)

    def _say(self, sequence: Sequence, token: Token) -> None:
        self._said.append(token)
        self._output_tokens += 1
        if token.finish is not None:
            self._remove(sequence)

    def _share(self, sequence: Sequence) -> None:
        """Let others find the blocks that are now full."""
        full = sequence.computed // self._pool.block_tokens
        if full > sequence.shared_blocks:
            self._pool.share(sequence.blocks, sequence.hashes_of(full), sequence.tokens, sequence.shared_blocks)
            sequence.shared_blocks = full

    def _take_out(self, sequence: Sequence) -> None:
        """Out of whichever queue it is in, its blocks free."""
        for queue in (self._decoding, self._prefilling, self._waiting):
            if sequence in queue:
                queue.remove(sequence)
                break
        self._pool.release(sequence.blocks)
        sequence.blocks, sequence.held_tokens = [], 0

    def _remove(self, sequence: Sequence) -> None:
        self._take_out(sequence)
        sequence.removed = True
        self._sequences.pop(sequence.key, None)

    def _fail(self, sequence: Sequence, error: str, *, finish: str = "error", retry: bool = True) -> None:
        self._remove(sequence)
        sender = sequence.sender
        if sender is not None:
            self._later.append(lambda: sender.fail(error, retry))
        else:
            self._said.append(sequence.ended(finish, error=error if finish == "error" else None, retry=retry))

    def _flush(self) -> None:
        """Say what there is to say, without the lock: callees may call back."""
        with self._lock:
            said, self._said = tuple(self._said), []
            later, self._later = self._later, []
            events = self._pool.take_events()
        for call in later:
            call()
        if said or events:
            try:
                self._sink(StepOutput(tokens=said, kv_events=events))
            except Exception:
                # The next step is due all the same.
                log.exception("the sink refused %d tokens", len(said))

    # ── requests on their way in ──

    def _layout(self) -> KvLayout:
        if self.layout is None:
            raise InvalidRequest(f"{self.model} is emulated without a KV layout: it neither sends nor takes KV")
        return self.layout

    def _sequence(self, submission: Submission, sender: Sender | None = None) -> Sequence:
        self._check(submission)
        return Sequence(
            submission,
            namespace=msgspec.structs.replace(self._namespace, salt=submission.request.salt),
            vocabulary=self._vocabulary,
            now_s=self._driver.clock(),
            sender=sender,
        )

    def _check(self, submission: Submission) -> None:
        """Raises InvalidRequest for what this engine can never do."""
        request, sampling, limits = submission.request, submission.request.sampling, self.limits
        sampling.check()
        tokens, longest = request.prompt + submission.generated, sampling.max_tokens
        if not request.prompt:
            raise InvalidRequest(f"an empty prompt for {self.model}", param="prompt")
        if (worst := max(tokens)) >= limits.vocabulary or (worst := min(tokens)) < 0:
            raise InvalidRequest(
                f"token id {worst} outside [0, {limits.vocabulary}), the vocabulary of {self.model}", param="prompt"
            )
        if len(submission.generated) >= longest:
            raise InvalidRequest(f"{len(submission.generated)} tokens generated already, max_tokens {longest}", param="max_tokens")
        wish = f"prompt {len(request.prompt)} plus max_tokens {longest}"
        if len(request.prompt) + longest > limits.context_tokens:
            raise InvalidRequest(
                f"{wish} above {limits.context_tokens}, the context of {self.model}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if (blocks := blocks_for(len(request.prompt) + longest - 1, limits.block_tokens)) > limits.kv_blocks:
            raise InvalidRequest(
                f"{wish} take {blocks} blocks, above the pool's {limits.kv_blocks}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        if sampling.logprobs is not None:
            raise InvalidRequest(f"{self.model} is emulated: it has no log-probabilities", param="logprobs")

    def _enqueue(self, sequence: Sequence) -> None:
        with self._lock:
            self._register(sequence)
            insort(self._waiting, sequence, key=rank_of)
            self._wake()

    def _register(self, sequence: Sequence) -> None:
        self._refuse_when_stopped()
        if len(self._waiting) >= MAX_WAITING:
            raise Overloaded(f"{len(self._waiting)} requests wait at {self.model}, the bound")
        request_id, attempt = sequence.key
        if sequence.key in self._sequences:
            raise InvalidRequest(f"request {request_id} attempt {attempt} is here already", param="request_id")
        self._sequences[sequence.key] = sequence
        self._order += 1
        sequence.rank = (-sequence.request.priority, self._order)

    def _refuse_when_stopped(self) -> None:
        if self._stopped:
            raise Unreachable(f"the engine of {self.model} has stopped")

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            self._driver.call_at(self._driver.clock(), self._turn)

    def _adopt(self, sequence: Sequence, state: RequestState, attempt: int) -> None:
        """Run a request whose KV has come."""
        ended = state.first is not None and state.first.finish is not None
        with self._lock:
            more = blocks_for(0 if ended else state.kv_tokens, self._pool.block_tokens) - len(sequence.blocks)
            if more > self._pool.available:
                raise Overloaded(f"{more} more blocks for KV that arrived, {self._pool.available} free")
            sequence.resume(state, attempt)
            self._register(sequence)
            self._reserved -= 1
            if more > 0:
                self._hold(sequence, self._pool.allocate(more) or [])
            if state.first is not None:
                self._said.append(sequence.shown_here(state.first, self._driver.clock()))
            if ended:
                self._remove(sequence)
            else:
                self._share(sequence)
                insort(self._decoding, sequence, key=rank_of)
                self._wake()
        self._driver.call_at(self._driver.clock(), self._flush)

    def _forget(self, sequence: Sequence) -> None:
        with self._lock:
            self._reserved -= 1
            self._take_out(sequence)
            # Those who wait may fit now.
            if self._waiting and not self._stopped:
                self._wake()


class _Chunk(NamedTuple):
    """So many of a prompt's tokens in one step."""

    sequence: Sequence
    count: int


class _Step(NamedTuple):
    decodes: list[Sequence]
    chunks: list[_Chunk]
    lasting_s: float
    end_s: float
    power_w: float


def _take(chunks: list[_Chunk], sequence: Sequence, budget: int) -> int:
    """Give a prompt what it needs of the budget; returns what is left."""
    count = min(len(sequence.tokens) - sequence.computed, budget)
    if count > 0:
        chunks.append(_Chunk(sequence, count))
    return budget - count


def _nobody(output: StepOutput) -> None:
    """Before `start` nobody listens."""
