from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidConfig
from cluster.hardware import accelerator
from cluster.models import model_shape
from cluster.performance import MAX_STEPS, PerformanceModel, causal_pairs, roofline
from cluster.piecewise import Knots
from cluster.step_table import AFFINE_FIT, StepTable, outside, read_table, step_table_of, write_table

FIT = msgspec.structs.replace(AFFINE_FIT, prefill_tokens=(128.0, 4096.0), sequences=(1.0, 64.0), kv_tokens=(1e3, 2e5), points=9)
BENT = StepTable(
    step_s=0.01,
    prefill=((0.0, 0.0), (512.0, 0.05), (2048.0, 0.3)),
    prefill_pair_s=1e-9,
    decode=((0.0, 0.0), (8.0, 0.001), (64.0, 0.02)),
    kv=((0.0, 0.0), (10_000.0, 0.001), (50_000.0, 0.02)),
    idle_w=70.0,
    prefill_w=700.0,
    decode_w=((0.0, 300.0), (8.0, 400.0), (64.0, 500.0), (65.0, 500.0)),
    fit=FIT,
)


@st.composite
def rising(draw: st.DrawFn, furthest: float, highest: float) -> Knots:
    steps = draw(st.lists(st.tuples(st.floats(1.0, furthest / 4), st.floats(0.0, highest / 4)), min_size=1, max_size=4))
    knots = [(0.0, 0.0)]
    for along, up in steps:
        knots.append((knots[-1][0] + along, knots[-1][1] + up))
    return tuple(knots)


tables = st.builds(
    StepTable,
    step_s=st.floats(1e-4, 0.1),
    prefill=rising(8192.0, 2.0),
    prefill_pair_s=st.floats(0.0, 1e-7),
    decode=rising(256.0, 0.2),
    kv=rising(100_000.0, 0.2),
    prefill_w=st.floats(400.0, 700.0),
    decode_w=st.just(((0.0, 100.0), (8.0, 300.0), (9.0, 300.0))),
    fit=st.just(FIT),
)
affine = st.builds(
    PerformanceModel,
    step_s=st.floats(1e-5, 0.1),
    prefill_token_s=st.floats(0.0, 1e-3),
    prefill_pair_s=st.floats(0.0, 1e-6),
    sequence_s=st.floats(0.0, 1e-3),
    kv_token_s=st.floats(0.0, 1e-5),
)
counts = st.integers(0, 100_000)
features = st.tuples(st.integers(1, 100_000), counts, counts, counts)


@given(tables, st.integers(1, 512), st.integers(0, 200_000), st.integers(0, 300))
def test_a_span_is_the_sum_of_its_single_steps(table: StepTable, batch: int, kv: int, steps: int) -> None:
    total = math.fsum(table.decode_step_s(batch, kv + step * batch) for step in range(steps))
    assert table.decode_span_s(batch, kv, steps) == pytest.approx(total, rel=1e-9)


@given(tables, st.integers(1, 512), counts, st.floats(0.0, 1000.0))
def test_steps_within_is_the_largest_that_fits(table: StepTable, batch: int, kv: int, within_s: float) -> None:
    steps = table.decode_steps_within(batch, kv, within_s)
    assert table.decode_span_s(batch, kv, steps) <= within_s < table.decode_span_s(batch, kv, steps + 1)


@given(tables, st.integers(1, 512), counts, st.integers(0, 20_000))
def test_steps_within_a_span_are_the_steps_of_that_span(table: StepTable, batch: int, kv: int, steps: int) -> None:
    assert table.decode_steps_within(batch, kv, table.decode_span_s(batch, kv, steps)) == steps


@given(tables, features, st.integers(0, 3), st.integers(1, 10_000))
def test_step_time_never_falls_when_a_feature_grows(table: StepTable, step: tuple[int, ...], which: int, more: int) -> None:
    longer = [value + more * (place == which) for place, value in enumerate(step)]
    assert table.step_time_s(*longer) >= table.step_time_s(*step) * (1 - 1e-12)


@given(affine, features, st.integers(1, 512), st.integers(0, 1000))
def test_a_table_of_an_affine_model_has_its_times_to_the_last_bit(
    model: PerformanceModel, step: tuple[int, int, int, int], batch: int, steps: int
) -> None:
    table = step_table_of(model)
    _, _, sequences, kv_tokens = step
    if sequences or not kv_tokens:  # KV tokens are of sequences that decode: there is no such step otherwise.
        assert table.step_time_s(*step) == model.step_time_s(*step)
    assert table.decode_span_s(batch, step[3], steps) == model.decode_span_s(batch, step[3], steps)
    assert table.decode_steps_within(batch, step[3], 1.0) == model.decode_steps_within(batch, step[3], 1.0)


def test_an_engine_without_pace_fits_every_step() -> None:
    table = step_table_of(PerformanceModel(step_s=0.0, prefill_token_s=0.0))
    assert table.step_time_s(9, 9, 9, 9) == 0.0
    assert table.decode_steps_within(8, 100, 0.0) == MAX_STEPS


@pytest.mark.parametrize(("device", "shape"), [("h100", "llama-3.1-8b"), ("a100-80g", "llama-2-13b"), ("l4", "qwen3-8b")])
def test_the_nearest_affine_model_of_an_affine_model_is_itself(device: str, shape: str) -> None:
    model = roofline(model_shape(shape), accelerator(device))
    nearest = step_table_of(model).affine()
    for name in ("step_s", "prefill_token_s", "prefill_pair_s", "sequence_s", "kv_token_s"):
        assert getattr(nearest, name) == pytest.approx(getattr(model, name), rel=1e-6)


def test_the_error_of_the_nearest_affine_model_is_what_a_bent_table_differs_by() -> None:
    model, (mean, largest) = BENT.affine(), BENT.affine_error()
    assert 0.0 < mean < largest
    seen = abs(model.prefill_s(4096) / BENT.prefill_s(4096) - 1)
    assert seen <= largest


def test_functions_go_on_along_their_last_two_knots() -> None:
    slope = (0.02 - 0.001) / (64 - 8)
    assert BENT.decode_step_s(100, 0) == pytest.approx(0.01 + 0.02 + 36 * slope)


def test_a_mixed_step_lasts_the_sum_of_its_parts_or_a_factor_of_as_many_prompt_tokens() -> None:
    step = (512, causal_pairs(0, 512), 8, 10_000)
    prompts_s = BENT.prefill_s(512)
    assert BENT.step_time_s(*step) == pytest.approx(prompts_s + 0.002)
    mixed = msgspec.structs.replace(BENT, mixed_factor=1.1)
    assert mixed.step_time_s(*step) == pytest.approx(1.1 * BENT.step_time_s(520, causal_pairs(0, 512), 0, 0))
    assert mixed.prefill_s(512) == prompts_s
    assert mixed.decode_step_s(8, 10_000) == BENT.decode_step_s(8, 10_000)


def test_watts_are_those_of_the_phase_and_between_both_in_a_mixed_step() -> None:
    pairs = causal_pairs(0, 512)
    assert BENT.power_w(0, 0, 0, 0) == 70.0
    assert BENT.power_w(512, pairs, 0, 0) == 700.0
    assert BENT.power_w(0, 0, 36, 1000) == 450.0
    assert BENT.power_w(0, 0, 500, 1000) == 500.0
    assert 400.0 < BENT.power_w(512, pairs, 8, 1000) < 700.0


@given(tables, st.floats(0.1, 100.0), features)
def test_scaling_divides_every_time(table: StepTable, speedup: float, step: tuple[int, int, int, int]) -> None:
    assert table.scaled(speedup).step_time_s(*step) * speedup == pytest.approx(table.step_time_s(*step), rel=1e-9)


def test_outside_says_what_and_where_the_domain_ends() -> None:
    assert outside(FIT, prompt_tokens=128, sequences=64, kv_tokens=1000) is None
    told = outside(FIT, prompt_tokens=9000, sequences=32, kv_tokens=10)
    assert told is not None
    assert "9000 prompt tokens in a step above 4096, 10 KV tokens below 1000" in told
    assert "sequences" not in told


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_table(tmp_path / "table.json", BENT)
    assert read_table(tmp_path / "table.json") == BENT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_s": -0.5}, r"step_s -0\.5 is outside \[0, infinity\)"),
        ({"prefill": [[0, 0], [8, 1], [8, 2]]}, r"prefill\[2\] is at 8, not above 8"),
        ({"decode": [[0, 0], [8, 1], [9, 0.5]]}, r"decode\[2\] is 0\.5, below 1"),
        ({"kv": [[1, 0], [8, 1]]}, r"kv\[0\] is \(1\.0, 0\.0\), where \(0, 0\)"),
        ({"kv": [[0, 0]]}, "kv has 1 knots, below 2"),
        ({"decode_w": [[0, 5], [1, -1]]}, r"decode_w\[1\] is \(1\.0, -1\.0\)"),
        ({"mixed_factor": 0.9}, r"mixed_factor 0\.9 is outside \[1, infinity\)"),
        ({"step_s": "long"}, r"Expected `float`, got `str` - at `\$\.table\.step_s`"),
        ({"steps": 1}, r"unknown field `steps` - at `\$\.table`"),
        ({"fit": {}}, r"missing required field `source` - at `\$\.table\.fit`"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_is_refused_by_file_field_and_value(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    write_table(path := tmp_path / "table.json", BENT)
    content = json.loads(path.read_text())
    content["table"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidConfig, match=rf"table\.json: .*{message}"):
        read_table(path)


def test_a_file_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text('{"schema": 2, "what": "else"}')
    with pytest.raises(InvalidConfig, match=r"table\.json: schema 2 is not 1"):
        read_table(tmp_path / "table.json")


def test_a_file_that_is_not_there_or_is_torn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"none\.json: no step table can be read there: No such file"):
        read_table(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"schema": 1, "ta')
    with pytest.raises(InvalidConfig, match=r"torn\.json: Input data was truncated"):
        read_table(tmp_path / "torn.json")
