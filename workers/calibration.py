"""Measures an engine's steps from outside: designed prompts and batches go in, and the times at which tokens come out are kept.

Everything goes through the `Engine` protocol, so that any engine can be measured, with what its own thread and sink cost. A prompt
is timed alone, from its submission to its first token: in one step, in chunks, and behind a prefix that is cached. A batch is
timed from one step's tokens to the next one's, while all of it decodes. Steps of prompts and decodes together are not measured.
"""

from __future__ import annotations

import itertools
import math
import statistics
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec

from cluster.errors import InvalidConfig, Unreachable
from cluster.kv import blocks_for
from cluster.performance import causal_pairs
from cluster.request import Request, SamplingParams
from cluster.table_fitting import Measured, Step
from workers.engines.engine import Engine, EngineLimits, StepOutput, Submission
from workers.engines.step_driver import Clock, ManualDriver

SHORTEST = 16  # Tokens; below, a prompt is little but the fixed part of a step.
MOST_TOKENS = 8192  # Of a prompt, and of a context.
MOST_BATCH_TOKENS = 65_536  # Prompts of one batch together: their prefill is only the way to what is measured.
GAPS = 9  # Decode steps that a batch is timed over: odd, so that the median is that of the middle one.
LEAST_GAPS = 3
LOOK_S = 1.0  # How often to see whether the engine still lives.


class Design(msgspec.Struct, frozen=True, kw_only=True):
    """What is tried."""

    prompts: tuple[int, ...]
    """Tokens of prompts that are computed whole, in chunks where they are above the engine's budget of a step."""
    continued: tuple[tuple[int, int], ...]
    """(tokens whose KV is cached, tokens after them)."""
    batches: tuple[tuple[int, int], ...]
    """(sequences that decode together, tokens of each one's prompt)."""

    @property
    def size(self) -> int:
        return len(self.prompts) + len(self.continued) + len(self.batches)


def design(limits: EngineLimits, *, max_prompt: int | None = None, max_batch: int | None = None) -> Design:
    """Doublings of prompts and batches, and contexts four times apart, as far as the engine and the bounds let them.

    Raises InvalidConfig where not even the shortest prompt, or a batch of one, fits.
    """
    pool = limits.kv_blocks * limits.block_tokens
    longest = min(limits.context_tokens - 1, pool - 1, MOST_TOKENS, max_prompt or MOST_TOKENS)
    if longest < 2 * SHORTEST:
        raise InvalidConfig(f"prompts of at most {longest} tokens, below {2 * SHORTEST}, which a calibration needs")
    prompts = _powers(SHORTEST, longest, 2)
    block = limits.block_tokens
    contexts = sorted({longest // part // block * block for part in (2, 4, 8)} - {0})
    continued = tuple(
        (context, tokens)
        for context in contexts
        for tokens in _powers(SHORTEST, min(longest - context, limits.step_budget_tokens), 4)
        if tokens > 1
    )
    most = min(limits.max_running, limits.step_budget_tokens - 1, max_batch or limits.max_running)
    batches = tuple(
        (batch, context)
        for batch in _powers(1, most, 2)
        for context in _powers(SHORTEST, longest, 4)
        if batch * context <= MOST_BATCH_TOKENS and _fits(batch, context, limits)
    )
    if not batches:
        raise InvalidConfig(
            f"no batch fits in {limits.kv_blocks} blocks of {block} tokens and a context of {limits.context_tokens}"
        )
    return Design(prompts=prompts, continued=continued, batches=batches)


def measure(
    engine: Engine,
    watch: Watch,
    plan: Design,
    *,
    rounds: int = 3,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> list[Measured]:
    """The quickest of so many rounds of each part of the design. `engine` is started, with `watch` as its sink, and idle.

    `told`: how many of how many are done. Raises Unreachable where the engine ends or fails a request.
    """
    bench = _Bench(engine, watch)
    tries: list[Callable[[], Measured | None]] = [
        *(lambda tokens=tokens: bench.prompt(0, tokens) for tokens in plan.prompts),
        *(lambda pair=pair: bench.prompt(*pair) for pair in plan.continued),
        *(lambda pair=pair: bench.batch(*pair) for pair in plan.batches),
    ]
    found: list[list[Measured]] = [[] for _ in tries]
    # Rounds outside: what is slow for a while spoils one round of many parts, not all rounds of one.
    for done, (_, part) in enumerate(itertools.product(range(rounds), range(len(tries)))):
        told(done, rounds * len(tries))
        if (point := tries[part]()) is not None:
            found[part].append(point)
    told(rounds * len(tries), rounds * len(tries))
    return [_least(points) for points in found if points]


class Heard(NamedTuple):
    at_s: float
    output: StepOutput


class Watch(Protocol):
    """A sink with a clock."""

    clock: Clock
    heard: list[Heard]

    def __call__(self, output: StepOutput) -> None: ...

    def ended(self, requests: int, alive: Callable[[], bool]) -> None:
        """Return once so many requests have ended since `heard` was cleared. Raises Unreachable where the engine has ended."""


class RealWatch:
    """For an engine with a thread, or a driver, of its own."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.heard: list[Heard] = []
        self._changed = threading.Condition()

    def __call__(self, output: StepOutput) -> None:
        at_s = self.clock()
        with self._changed:
            self.heard.append(Heard(at_s, output))
            self._changed.notify()

    def ended(self, requests: int, alive: Callable[[], bool]) -> None:
        with self._changed:
            while _finished(self.heard) < requests:
                if not self._changed.wait(LOOK_S) and not alive():
                    raise Unreachable("the engine ended while it was measured")


class VirtualWatch:
    """For an engine on a `ManualDriver`: its time passes while one waits, at once and without lateness."""

    def __init__(self, driver: ManualDriver) -> None:
        self.clock = driver.clock
        self.heard: list[Heard] = []
        self._driver = driver

    def __call__(self, output: StepOutput) -> None:
        self.heard.append(Heard(self.clock(), output))

    def ended(self, requests: int, alive: Callable[[], bool]) -> None:
        self._driver.drain()
        if _finished(self.heard) < requests:
            raise Unreachable("the engine ended while it was measured")


class _Bench:
    def __init__(self, engine: Engine, watch: Watch) -> None:
        self._engine, self._watch = engine, watch
        self._numbers = itertools.count()

    def prompt(self, context: int, tokens: int) -> Measured:
        """One alone, of `context` + `tokens`, of which the first are made to be cached."""
        salt = f"calibration-{next(self._numbers)}"
        if context:
            self._run([self._request(context + 1, 1, salt)])
        began_s = self._run([self._request(context + tokens, 1, salt)])
        at_s, first = next((heard.at_s, heard.output.tokens[0]) for heard in self._watch.heard if heard.output.tokens)
        cached = first.cached_tokens or 0
        return Measured(chunks(cached, context + tokens - cached, self._engine.limits.step_budget_tokens), at_s - began_s)

    def batch(self, sequences: int, prompt: int) -> Measured | None:
        """Decode steps of all together. None: too few were seen with nothing else between them."""
        outputs = most_outputs(sequences, prompt, self._engine.limits)
        self._run([self._request(prompt, outputs, f"calibration-{next(self._numbers)}") for _ in range(sequences)])
        told = [heard for heard in self._watch.heard if heard.output.tokens]
        gaps = [
            (prompt * sequences + sum(token.index for token in after.output.tokens), after.at_s - before.at_s)
            for before, after in itertools.pairwise(told)
            if len(before.output.tokens) == len(after.output.tokens) == sequences and all(t.index for t in after.output.tokens)
        ]
        if len(gaps) < LEAST_GAPS:
            return None
        middle = len(gaps) // 2
        near = gaps[max(0, middle - GAPS // 2) : middle + GAPS // 2 + 1]
        # KV grows by as much in each step: the median of the times is taken at the median of what was kept.
        step = Step(0, 0, sequences, statistics.median(kv_tokens for kv_tokens, _ in near))
        return Measured((step,), statistics.median(seconds for _, seconds in near))

    def _request(self, prompt: int, outputs: int, salt: str) -> Request:
        number, vocabulary = next(self._numbers), self._engine.limits.vocabulary
        return Request(
            request_id=f"calibration-{number}",
            model="calibration",
            prompt=tuple((7 + 31 * place) % vocabulary for place in range(prompt)),
            sampling=SamplingParams(max_tokens=outputs, temperature=0.0, ignore_eos=True),
            salt=salt,
        )

    def _run(self, requests: Sequence[Request]) -> float:
        """Have them all run to their end. When they were submitted."""
        self._watch.heard.clear()
        began_s = self._watch.clock()
        for request in requests:
            self._engine.submit(Submission(request=request))
        self._watch.ended(len(requests), lambda: self._engine.alive)
        for heard in self._watch.heard:
            for token in heard.output.tokens:
                if token.error is not None:
                    raise Unreachable(f"the engine failed a request while it was measured: {token.error}")
        return began_s


def chunks(context: int, tokens: int, budget: int) -> tuple[Step, ...]:
    """The steps in which a prompt is computed that is alone: of so many tokens after so many that have their KV."""
    steps = []
    for start in range(context, context + tokens, budget):
        count = min(budget, context + tokens - start)
        # A chunk of one token is a step like a decoding sequence's.
        steps.append(Step(count, causal_pairs(start, count), 0, 0) if count > 1 else Step(0, 0, 1, start + 1))
    return tuple(steps)


def most_outputs(sequences: int, prompt: int, limits: EngineLimits) -> int:
    """Tokens each of a batch must generate, so that all decode together for some steps: the first waits for the last's prompt."""
    free = max(1, limits.step_budget_tokens - sequences)
    return math.ceil(sequences * prompt / free) + sequences + GAPS + 2


def _fits(sequences: int, prompt: int, limits: EngineLimits) -> bool:
    tokens = prompt + most_outputs(sequences, prompt, limits)
    return tokens <= limits.context_tokens and sequences * blocks_for(tokens, limits.block_tokens) <= limits.kv_blocks


def _powers(low: int, high: int, ratio: int) -> tuple[int, ...]:
    return tuple(itertools.takewhile(lambda value: value <= high, (low * ratio**power for power in itertools.count())))


def _finished(heard: Sequence[Heard]) -> int:
    return sum(token.finish is not None for each in heard for token in each.output.tokens)


def _least(points: Sequence[Measured]) -> Measured:
    """Of rounds of one part of the design the quickest, as in an engine's `warm`: what else runs on the machine only adds."""
    return min(points, key=lambda point: point.seconds)
