"""One engine's work, done by the emulated engine and by the simulator's: the same requests at the same times, and when each ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cluster.performance import PerformanceModel
from cluster.request import Request, SamplingParams
from simulator.engines import Engines
from simulator.steps.records import FINISHED, FIRST_TOKEN, REMOVED, STORED
from workers.engines.emulated import EmulatedEngine
from workers.engines.engine import StepOutput, Submission
from workers.engines.step_driver import ManualDriver


class Asked(NamedTuple):
    """One request. Prompts of one `family` share their beginning."""

    at_s: float
    prompt: int
    output: int
    priority: int = 0
    family: int = 0


class Shape(NamedTuple):
    """Of the engine."""

    kv_blocks: int
    block_tokens: int
    max_running: int
    step_budget_tokens: int


class Times(NamedTuple):
    first_s: float
    last_s: float
    cached: int


PERFORMANCE = PerformanceModel(
    step_s=7e-3, prefill_token_s=3e-5, prefill_pair_s=2e-9, sequence_s=4e-5, kv_token_s=3e-8, idle_w=70, prefill_w=690, decode_w=430
)


def tokens_of(asked: Asked, number: int) -> tuple[int, ...]:
    """The first half is the family's, the rest its own."""
    shared = asked.prompt // 2
    return tuple((7 * asked.family + i) % 997 for i in range(shared)) + tuple(
        (13 * number + i) % 983 for i in range(asked.prompt - shared)
    )


def emulated(requests: Sequence[Asked], shape: Shape, performance: PerformanceModel = PERFORMANCE) -> list[Times]:
    driver = ManualDriver()
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    cached: dict[str, int] = {}

    def hear(output: StepOutput) -> None:
        for token in output.tokens:
            if token.times is not None:
                first[token.request_id], cached[token.request_id] = driver.now_s, token.cached_tokens or 0
            if token.finish:
                last[token.request_id] = driver.now_s

    engine = EmulatedEngine(
        model="m", performance=performance, context_tokens=10**6, vocabulary=1000, driver=driver, **shape._asdict()
    )
    engine.start(hear)
    for number, asked in enumerate(requests):
        request = Request(
            request_id=str(number),
            model="m",
            prompt=tokens_of(asked, number),
            sampling=SamplingParams(max_tokens=asked.output),
            priority=asked.priority,
        )
        driver.call_at(asked.at_s, lambda request=request: engine.submit(Submission(request=request)))
    driver.drain()
    return [Times(first[str(n)], last[str(n)], cached[str(n)]) for n in range(len(requests))]


def simulated(
    requests: Sequence[Asked], shape: Shape, performance: PerformanceModel = PERFORMANCE, *, stepwise: bool = False
) -> list[Times]:
    from cluster.kv import KvNamespace, block_hashes

    engines = Engines(stepwise=stepwise, telling=True)
    engine = engines.add(model=engines.model(performance), **shape._asdict())
    rows: dict[int, int] = {}
    found: dict[int, Times] = {}
    space = KvNamespace(model="m", block_tokens=shape.block_tokens)
    told: set[int] = set()

    def take() -> None:
        for said in engines.take_said():
            if said.kind == STORED:
                assert not told & set(said.hashes)
                told.update(said.hashes)
            elif said.kind == REMOVED:
                assert told >= set(said.hashes)
                told.difference_update(said.hashes)
            elif said.kind == FINISHED:
                r = engines.state.requests[said.request]
                found[rows[said.request]] = Times(r["first_s"], r["last_s"], r["cached"])
                engines.free(said.request)

    for number in sorted(range(len(requests)), key=lambda n: requests[n].at_s):
        asked = requests[number]
        while not engines.advance(asked.at_s):
            take()
        take()
        hashes = block_hashes(tokens_of(asked, number), space)
        hashes += [2**63 + number * 2**20 + i for i in range(len(hashes), (asked.prompt + asked.output - 1) // shape.block_tokens)]
        row = engines.request(
            arrival_s=asked.at_s, prompt=asked.prompt, output=asked.output, hashes=hashes, priority=asked.priority
        )
        rows[row] = number
        engines.submit(row, engine, asked.at_s, asked.at_s)
    while not engines.advance(math.inf):
        take()
    take()
    assert engines.state.engines["used"][engine] == 0
    return [found[n] for n in range(len(requests))]


_ = FIRST_TOKEN
