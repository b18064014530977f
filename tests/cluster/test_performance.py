from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cluster.performance import MAX_STEPS, PerformanceModel, causal_pairs

seconds = st.floats(0.0, 0.1, allow_subnormal=False)
counts = st.integers(0, 100_000)
models = st.builds(
    PerformanceModel,
    step_s=st.floats(1e-5, 0.1),
    prefill_token_s=seconds,
    prefill_pair_s=seconds,
    sequence_s=seconds,
    kv_token_s=st.floats(0.0, 1e-3, allow_subnormal=False),
    idle_w=st.just(50.0),
    decode_w=st.floats(50.0, 400.0),
    prefill_w=st.floats(400.0, 700.0),
)
features = st.tuples(counts, counts, counts, counts)
ONE = PerformanceModel(step_s=0.01, prefill_token_s=1e-4, prefill_pair_s=1e-8, sequence_s=1e-4, kv_token_s=1e-7)
UNPACED = PerformanceModel(step_s=0.0, prefill_token_s=0.0)


@given(models, features, st.integers(0, 3), st.integers(1, 10_000))
def test_step_time_never_falls_when_a_feature_grows(model: PerformanceModel, step: tuple[int, ...], which: int, more: int) -> None:
    longer = [value + more * (place == which) for place, value in enumerate(step)]
    assert model.step_time_s(*longer) >= model.step_time_s(*step)


@given(models, st.integers(1, 512), counts, counts)
def test_decode_step_is_affine_in_kv(model: PerformanceModel, batch: int, kv: int, more: int) -> None:
    base = model.decode_step_s(batch, 0)
    expected = (model.decode_step_s(batch, kv) - base) + (model.decode_step_s(batch, more) - base)
    assert model.decode_step_s(batch, kv + more) - base == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(models, st.integers(1, 512), counts, st.integers(0, 200))
def test_span_is_the_sum_of_its_steps(model: PerformanceModel, batch: int, kv: int, steps: int) -> None:
    total = math.fsum(model.decode_step_s(batch, kv + step * batch) for step in range(steps))
    assert model.decode_span_s(batch, kv, steps) == pytest.approx(total, rel=1e-12)


@given(models, st.integers(1, 512), counts, st.integers(0, 20_000))
def test_steps_within_a_span_are_the_steps_of_that_span(model: PerformanceModel, batch: int, kv: int, steps: int) -> None:
    assert model.decode_steps_within(batch, kv, model.decode_span_s(batch, kv, steps)) == steps


@given(models, st.integers(1, 512), counts, st.floats(0.0, 1000.0))
def test_steps_within_is_the_largest_that_fits(model: PerformanceModel, batch: int, kv: int, within_s: float) -> None:
    steps = model.decode_steps_within(batch, kv, within_s)
    assert model.decode_span_s(batch, kv, steps) <= within_s < model.decode_span_s(batch, kv, steps + 1)


@pytest.mark.parametrize("within_s", [0.0, 1e-9, 1e-5, 1.0])
def test_steps_within_holds_where_growth_outweighs_the_first_step(within_s: float) -> None:
    model = PerformanceModel(step_s=1e-5, prefill_token_s=0.0, kv_token_s=1e-3)
    steps = model.decode_steps_within(512, 0, within_s)
    assert model.decode_span_s(512, 0, steps) <= within_s < model.decode_span_s(512, 0, steps + 1)


@given(models, st.integers(1, 20_000), st.data())
def test_a_prompt_in_chunks_costs_one_fixed_part_a_chunk_more(model: PerformanceModel, tokens: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, tokens))
    chunks = model.step_time_s(cut, causal_pairs(0, cut), 0, 0) + model.prefill_s(tokens, cut)
    assert chunks == pytest.approx(model.prefill_s(tokens) + model.step_s, rel=1e-9)
    assert model.prefill_s(tokens, cut) <= model.prefill_s(tokens)


@given(st.integers(0, 50), st.integers(0, 50))
def test_causal_pairs_count_each_token_with_all_up_to_itself(context: int, tokens: int) -> None:
    assert causal_pairs(context, tokens) == sum(context + place + 1 for place in range(tokens))


def test_prefill_takes_uncached_tokens_over_the_whole_prompt() -> None:
    assert ONE.prefill_s(100, 60) == pytest.approx(0.01 + 40 * 1e-4 + (40 * 60 + 820) * 1e-8)


@given(models, features)
def test_power_lies_between_decode_and_prefill_watts(model: PerformanceModel, step: tuple[int, ...]) -> None:
    assume(step[0] + step[2] > 0)
    assert model.decode_w * (1 - 1e-12) <= model.power_w(*step) <= model.prefill_w * (1 + 1e-12)


@given(models, st.integers(1, 256), st.integers(0, 4096))
def test_decode_power_is_concave_in_the_batch(model: PerformanceModel, batch: int, context: int) -> None:
    low, middle, high = (model.power_w(0, 0, size, size * context) for size in (batch, 2 * batch, 3 * batch))
    assert middle - low >= high - middle - 1e-9


def test_nothing_to_compute_draws_idle_watts() -> None:
    assert msgspec.structs.replace(ONE, idle_w=70.0, decode_w=400.0, prefill_w=700.0).power_w(0, 0, 0, 0) == 70.0


@given(models, st.floats(0.1, 100.0), features)
def test_scaling_divides_every_time_and_no_watts(model: PerformanceModel, speedup: float, step: tuple[int, ...]) -> None:
    faster = model.scaled(speedup)
    assert faster.step_time_s(*step) * speedup == pytest.approx(model.step_time_s(*step), rel=1e-9)
    assert faster.power_w(*step) == pytest.approx(model.power_w(*step), rel=1e-9)


def test_a_model_without_pace_takes_no_time_and_fits_every_step() -> None:
    assert UNPACED.step_time_s(9, 9, 9, 9) == 0.0
    assert UNPACED.decode_steps_within(8, 100, 0.0) == MAX_STEPS
