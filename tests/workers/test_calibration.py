from __future__ import annotations

import pytest

from cluster.errors import InvalidConfig, Unreachable
from cluster.performance import PerformanceModel, causal_pairs
from cluster.table_fitting import Step
from workers.calibration import VirtualWatch, chunks, design, measure
from workers.engines.emulated import EmulatedEngine
from workers.engines.engine import EngineLimits
from workers.engines.step_driver import ManualDriver

MODEL = PerformanceModel(step_s=0.01, prefill_token_s=1e-4, prefill_pair_s=1e-8, sequence_s=1e-4, kv_token_s=1e-7)
LIMITS = EngineLimits(context_tokens=2048, kv_blocks=256, block_tokens=16, max_running=8, step_budget_tokens=128, vocabulary=1000)


@pytest.fixture
def watched() -> tuple[EmulatedEngine, VirtualWatch]:
    watch = VirtualWatch(driver := ManualDriver())
    engine = EmulatedEngine(
        model="m", performance=MODEL, kv_blocks=256, context_tokens=2048, vocabulary=1000, driver=driver, max_running=8,
        step_budget_tokens=128,
    )  # fmt: skip
    engine.start(watch)
    return engine, watch


def test_every_measurement_is_the_time_of_the_steps_it_names(watched: tuple[EmulatedEngine, VirtualWatch]) -> None:
    plan = design(LIMITS)
    points = measure(*watched, plan)
    assert len(points) == plan.size
    for point in points:
        assert point.seconds == pytest.approx(sum(MODEL.step_time_s(*map(int, step)) for step in point.steps), rel=1e-6)


def test_all_is_over_when_measuring_ends(watched: tuple[EmulatedEngine, VirtualWatch]) -> None:
    measure(*watched, design(LIMITS, max_prompt=64, max_batch=2), rounds=1)
    load = watched[0].load()
    assert (load.running, load.waiting, load.preemptions) == (0, 0, 0)


def test_progress_is_told_to_the_end(watched: tuple[EmulatedEngine, VirtualWatch]) -> None:
    told: list[tuple[int, int]] = []
    plan = design(LIMITS, max_prompt=64, max_batch=2)
    measure(*watched, plan, rounds=2, told=lambda done, of: told.append((done, of)))
    assert told == [(done, 2 * plan.size) for done in range(2 * plan.size + 1)]


def test_an_engine_that_ends_is_not_waited_for(watched: tuple[EmulatedEngine, VirtualWatch]) -> None:
    engine, watch = watched
    engine.stop()
    with pytest.raises(Unreachable):
        measure(engine, watch, design(LIMITS))


def test_a_design_stays_within_the_engine_and_the_bounds() -> None:
    plan = design(LIMITS, max_prompt=300, max_batch=4)
    assert plan.prompts == (16, 32, 64, 128, 256)
    assert {batch for batch, _ in plan.batches} == {1, 2, 4}
    assert all(context + tokens <= 300 and context % 16 == 0 for context, tokens in plan.continued)


def test_an_engine_too_small_to_measure_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="prompts of at most 20 tokens, below 32"):
        design(LIMITS, max_prompt=20)


def test_a_prompt_is_computed_in_chunks_of_the_budget() -> None:
    assert chunks(0, 250, 100) == (
        Step(100, causal_pairs(0, 100)),
        Step(100, causal_pairs(100, 100)),
        Step(50, causal_pairs(200, 50)),
    )
    assert chunks(32, 16, 100) == (Step(16, causal_pairs(32, 16)),)


def test_a_chunk_of_one_token_is_a_step_of_one_sequence() -> None:
    assert chunks(0, 101, 100)[1] == Step(0, 0, 1, 101)
