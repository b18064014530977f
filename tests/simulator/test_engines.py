"""Engines: equal to the emulated engine, whole spans equal to single steps, and books that balance whatever is asked of them."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.performance import PerformanceModel
from cluster.slo import Slo
from cluster.step_table import Fit, StepTable
from simulator.engines import Engines
from simulator.sketch import ERROR, bucket_of, quantiles_s
from simulator.steps.records import (
    CHUNKED,
    ENDED,
    ENTRIES_USED,
    FINISHED,
    FIRST_TOKEN,
    ITL,
    OUTPUT_TOKENS,
    PREFILL_ONLY,
    PREFILLED,
    PROMPTS_FIRST,
    UNSHARED,
    WHOLE_PROMPTS,
)
from tests.simulator.alike import PERFORMANCE, Asked, Shape, emulated, simulated

RELATIVE = 1e-9

TABLE = StepTable(
    step_s=5e-3,
    prefill=((0.0, 0.0), (256.0, 4e-3), (2048.0, 60e-3)),
    prefill_pair_s=1e-9,
    decode=((0.0, 0.0), (8.0, 4e-4), (64.0, 9e-3)),
    kv=((0.0, 0.0), (300.0, 2e-4), (900.0, 3e-4), (5000.0, 4e-3)),
    idle_w=70.0,
    prefill_w=650.0,
    decode_w=((0.0, 300.0), (64.0, 600.0)),
    fit=Fit(
        source="made up",
        points=1,
        mean_error=0.0,
        largest_error=0.0,
        prefill_tokens=(0.0, 1.0),
        sequences=(0.0, 1.0),
        kv_tokens=(0.0, 1.0),
        hardware="none",
        model="none",
    ),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Asked], Shape]:
    """Requests that an engine can hold one by one, and often not all together."""
    shape = Shape(
        kv_blocks=draw(st.sampled_from((20, 40, 80, 1000))),
        block_tokens=draw(st.sampled_from((4, 16))),
        max_running=draw(st.sampled_from((2, 8, 64))),
        step_budget_tokens=draw(st.sampled_from((16, 64, 512))),
    )
    capacity, chance = shape.kv_blocks * shape.block_tokens, Random(draw(st.integers(0, 2**32)))
    requests, at_s = [], 0.0
    for _ in range(draw(st.integers(1, 30))):
        at_s += chance.expovariate(chance.choice((1.0, 10.0, 100.0)))
        prompt = chance.randint(1, max(1, min(400, capacity // 2)))
        output = chance.randint(1, max(1, min(100, capacity - prompt)))
        requests.append(Asked(at_s, prompt, output, chance.choice((0, 0, 1)), chance.randint(0, 2)))
    return requests, shape


def assert_alike(ones, others) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one.first_s == pytest.approx(other.first_s, rel=RELATIVE)
        assert one.last_s == pytest.approx(other.last_s, rel=RELATIVE)
        assert one.cached == other.cached


@settings(max_examples=60)
@given(case=cases())
def test_an_engine_does_what_the_emulated_engine_does(case):
    assert_alike(simulated(*case), emulated(*case))


@settings(max_examples=60)
@given(case=cases())
def test_spans_are_the_sum_of_their_steps(case):
    assert_alike(simulated(*case), simulated(*case, stepwise=True))


@settings(max_examples=60)
@given(case=cases())
def test_spans_are_the_sum_of_their_steps_where_step_times_bend(case):
    assert_alike(simulated(*case, performance=TABLE), simulated(*case, performance=TABLE, stepwise=True))


class Run:
    """Some engines to which everything that can happen happens, drawn from a seed."""

    def __init__(self, seed: int, *, stepwise: bool = False, batching: int = CHUNKED) -> None:
        self.chance = Random(seed)
        self.engines = Engines((Slo(ttft_s=1.0, tpot_s=0.05),), telling=True, stepwise=stepwise)
        model = self.engines.model(TABLE)
        self.rows = [
            self.engines.add(model=model, kv_blocks=60, block_tokens=8, max_running=6, step_budget_tokens=96, batching=batching)
            for _ in range(3)
        ]
        self.open: dict[int, int] = {}
        self.reserved: dict[int, int] = {}
        self.finished: list[tuple[int, int, float]] = []
        self.firsts: list[int] = []
        self.started = self.dropped = 0
        self.now_s = 0.0

    def play(self, events: int) -> None:
        for _ in range(events):
            self.now_s += self.chance.expovariate(20.0)
            self.advance(self.now_s)
            self.chance.choice((self.submit, self.submit, self.submit, self.reserve, self.take_over, self.take_out, self.slow))()
            self.check()
        for row in list(self.reserved):
            self.engines.take_out(row, self.now_s)
            self.give_up(row)
        self.advance(math.inf)
        self.check()

    def advance(self, until_s: float) -> None:
        while not self.engines.advance(until_s):
            self.hear()
        self.hear()

    def hear(self) -> None:
        for said in self.engines.take_said():
            if said.kind == FIRST_TOKEN:
                self.firsts.append(self.open[said.request])
            elif said.kind == FINISHED:
                request = self.engines.state.requests[said.request]
                assert request["generated"] == request["output"]
                self.finished.append((self.open.pop(said.request), int(request["output"]), float(request["last_s"])))
                self.engines.free(said.request)
            elif said.kind == PREFILLED:
                self.open.pop(said.request)
                self.engines.free(said.request)

    def request(self, task: int = 0) -> int:
        prompt, output = self.chance.randint(1, 200), self.chance.randint(1, 60)
        family = self.chance.randrange(3)
        hashes = [family * 1000 + i for i in range(min(prompt, 100) // 8)]
        hashes += [10**6 * (self.started + 1) + i for i in range(len(hashes), (prompt + output - 1) // 8)]
        row = self.engines.request(
            arrival_s=self.now_s, prompt=prompt, output=output, hashes=hashes, priority=self.chance.randrange(2), task=task
        )
        self.open[row] = self.started
        self.started += 1
        return row

    def submit(self) -> None:
        task = self.chance.choice((0, 0, 0, PREFILL_ONLY))
        self.dropped += task == PREFILL_ONLY
        later_s = self.chance.choice((0.0, 0.0, 0.003))
        self.engines.submit(self.request(task), self.chance.choice(self.rows), self.now_s + later_s, self.now_s)

    def reserve(self) -> None:
        row, engine = self.request(), self.chance.choice(self.rows)
        if self.engines.reserve(row, engine, self.now_s):
            self.reserved[row] = engine
        else:
            self.engines.submit(row, engine, self.now_s, self.now_s)

    def take_over(self) -> None:
        for row in list(self.reserved)[:1]:
            del self.reserved[row]
            self.engines.state.requests["generated"][row] = 1
            if not self.engines.take_over(row, self.now_s):
                self.engines.take_out(row, self.now_s)
                self.give_up(row)

    def take_out(self) -> None:
        rows = [row for row in self.open if row not in self.reserved]
        if rows:
            row = self.chance.choice(rows)
            self.engines.take_out(row, self.now_s)
            self.hear()
            if row in self.open:
                self.dropped += self.engines.state.requests["task"][row] != PREFILL_ONLY
                self.open.pop(row)
                self.engines.free(row)

    def give_up(self, row: int) -> None:
        self.reserved.pop(row, None)
        self.open.pop(row)
        self.engines.free(row)
        self.dropped += 1

    def slow(self) -> None:
        self.engines.slow(self.chance.choice(self.rows), self.chance.choice((1.0, 2.5)), self.now_s)

    def check(self) -> None:
        """What must hold at any time."""
        state = self.engines.state
        for row in self.rows:
            engine = state.engines[row]
            held = int(state.requests["blocks"][list(self.open)][state.requests["engine"][list(self.open)] == row].sum())
            assert 0 <= engine["used"] <= engine["kv_blocks"]
            assert engine["used"] + engine["cached"] <= engine["kv_blocks"]
            assert engine["used"] <= held
            assert engine["batch"] + engine["prefilling"] + engine["reserved"] + engine["joining"] <= engine["places"]
            assert min(engine["waiting_tokens"], engine["waiting"], engine["prefilling"], engine["reserved"]) >= 0
        assert state.counts[UNSHARED] == 0


@pytest.mark.parametrize("batching", [CHUNKED, PROMPTS_FIRST, WHOLE_PROMPTS])
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_nothing_is_lost_or_served_twice_and_blocks_stay_within_bounds(batching, seed):
    run = Run(seed, batching=batching)
    run.play(120)
    assert not run.open
    assert len({number for number, _, _ in run.finished}) == len(run.finished)
    assert len(run.finished) + run.dropped == run.started
    state = run.engines.state
    assert not state.engines["used"][run.rows].any()
    assert state.counts[ENTRIES_USED] == state.engines["cached"][run.rows].sum()
    assert not state.engines["waiting_tokens"][run.rows].any()
    assert state.tallies[0, ENDED] == len(run.finished)
    assert state.tallies[0, OUTPUT_TOKENS] == sum(output for _, output, _ in run.finished)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), batching=st.sampled_from((CHUNKED, PROMPTS_FIRST, WHOLE_PROMPTS)))
def test_spans_equal_single_steps_whatever_interrupts_them(seed, batching):
    spans, steps = Run(seed, batching=batching), Run(seed, batching=batching, stepwise=True)
    spans.play(80)
    steps.play(80)
    assert [one[:2] for one in spans.finished] == [one[:2] for one in steps.finished]
    assert [one[2] for one in spans.finished] == pytest.approx([one[2] for one in steps.finished], rel=RELATIVE)
    for row in spans.rows:
        one, other = spans.engines.work(row, spans.now_s), steps.engines.work(row, steps.now_s)
        assert (one.busy_s, one.steps) == (pytest.approx(other.busy_s, rel=RELATIVE), other.steps)
        assert one[2:] == other[2:]


def test_gaps_between_tokens_are_those_of_single_steps():
    case = [Asked(0.1 * i, 40 + 7 * i, 30 + i) for i in range(20)], Shape(1000, 16, 8, 64)
    counted = []
    for stepwise in (False, True):
        engines = Engines(stepwise=stepwise)
        engine = engines.add(model=engines.model(TABLE), **case[1]._asdict())
        for asked in case[0]:
            engines.advance(asked.at_s)
            engines.submit(
                engines.request(arrival_s=asked.at_s, prompt=asked.prompt, output=asked.output), engine, asked.at_s, asked.at_s
            )
        engines.advance(math.inf)
        counted.append(engines.state.sketches[0, ITL])
    assert counted[0].sum() == sum(asked.output - 1 for asked in case[0])
    # A gap that is a bucket's very bound may fall to either side of it.
    assert np.abs(np.cumsum(counted[0] - counted[1])).max() <= 3


def test_a_table_draws_the_watts_of_what_it_does():
    engines = Engines()
    engine = engines.add(model=engines.model(TABLE), kv_blocks=100, block_tokens=16, max_running=8, step_budget_tokens=512)
    engines.submit(engines.request(arrival_s=0.0, prompt=200, output=11), engine, 0.0, 0.0)
    engines.advance(math.inf)
    work = engines.work(engine, float(engines.state.clock[0]))
    prompt_s = TABLE.prefill_s(200)
    decode_s = TABLE.decode_span_s(1, 201, 10)
    joules = prompt_s * TABLE.power_w(200, 20100, 0, 0) + decode_s * TABLE.power_w(0, 0, 1, 201)
    assert work.busy_s == pytest.approx(prompt_s + decode_s, rel=RELATIVE)
    assert work.energy_j == pytest.approx(joules, rel=RELATIVE)


def test_an_affine_model_draws_the_watts_it_states():
    engines = Engines()
    engine = engines.add(model=engines.model(PERFORMANCE), kv_blocks=100, block_tokens=16, max_running=8, step_budget_tokens=512)
    engines.submit(engines.request(arrival_s=0.0, prompt=100, output=4), engine, 0.0, 0.0)
    engines.advance(math.inf)
    features = [(100, 5050, 0, 0), (0, 0, 1, 101), (0, 0, 1, 102), (0, 0, 1, 103)]
    joules = sum(PERFORMANCE.step_time_s(*one) * PERFORMANCE.power_w(*one) for one in features)
    assert engines.work(engine, 10.0).energy_j == pytest.approx(joules, rel=RELATIVE)


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.8])
def test_prompts_of_one_length_wait_as_in_an_m_d_1_queue(utilisation):
    """Mean wait rho D / (2 (1 - rho)) (Pollaczek and Khinchine; DistServe, OSDI'24, section 3.1)."""
    performance = PerformanceModel(step_s=1e-3, prefill_token_s=1e-3)
    service_s = performance.prefill_s(99)
    engines, chance, at_s, count = Engines(), Random(5), 0.0, 60_000
    engine = engines.add(
        model=engines.model(performance),
        kv_blocks=10**6,
        block_tokens=16,
        max_running=99,
        step_budget_tokens=99,  # One prompt a step.
    )
    waited_s = 0.0
    rows: dict[int, float] = {}

    def hear() -> float:
        total_s = 0.0
        for said in engines.take_said():
            if said.kind == FINISHED:
                total_s += said.time_s - rows.pop(said.request) - service_s
                engines.free(said.request)
        return total_s

    for _ in range(count):
        at_s += chance.expovariate(utilisation / service_s)
        while not engines.advance(at_s):
            waited_s += hear()
        waited_s += hear()
        row = engines.request(arrival_s=at_s, prompt=99, output=1)
        rows[row] = at_s
        engines.submit(row, engine, at_s, at_s)
    while not engines.advance(math.inf):
        waited_s += hear()
    waited_s += hear()
    assert waited_s / count == pytest.approx(utilisation * service_s / (2 * (1 - utilisation)), rel=0.08)


@given(values=st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=200), share=st.floats(0.0, 1.0))
def test_quantiles_are_right_to_the_stated_error(values, share):
    counts = np.zeros(10_000, np.int64)
    for value in values:
        counts[bucket_of(value)] += 1
    (found,) = quantiles_s(counts, (share,))
    true = sorted(values)[max(math.ceil(share * len(values)), 1) - 1]
    assert found == pytest.approx(true, rel=ERROR * 1.0001)
