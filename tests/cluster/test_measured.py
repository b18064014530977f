"""Tables of named models on named machines, and how far scaling from one machine to another was right."""

from __future__ import annotations

import statistics

import pytest

from cluster.errors import InvalidConfig
from cluster.hardware import ACCELERATORS, accelerator
from cluster.measured import measured_tables, scaled_to, table_for
from cluster.models import MODELS, model_shape
from cluster.performance import roofline
from cluster.step_table import StepTable, outside


def test_what_was_measured_is_taken_as_it_is() -> None:
    table = table_for("bloom-176b", "a100-80g", 8)
    assert table in measured_tables()
    assert table.fit.derived == ""
    # Splitwise's own figures: a prompt of 2048 tokens, and a step of one and of 64 sequences.
    assert table.prefill_s(2048) == pytest.approx(0.540, rel=0.03)
    assert table.decode_step_s(1, 576) == pytest.approx(0.0488, rel=0.03)
    assert table.decode_step_s(64, 64 * 576) == pytest.approx(0.0966, rel=0.03)


def test_prompts_beyond_two_thousand_tokens_bend_as_splitwise_found() -> None:
    table = table_for("bloom-176b", "a100-80g", 8)
    assert table.prefill_s(4096) > 2.2 * table.prefill_s(2048)


def test_watts_of_the_a100_are_those_of_its_phases() -> None:
    table, tdp_w = table_for("llama-2-70b", "a100-80g", 8), 8 * 400
    assert 0.95 * tdp_w <= table.power_w(2048, 0, 0, 0) <= 1.05 * tdp_w
    assert 0.42 * tdp_w <= table.power_w(0, 0, 8, 4000) <= 0.45 * tdp_w


def test_watts_of_decoding_grow_with_the_batch_as_measured() -> None:
    table = table_for("llama-3.1-70b", "h100", 4)
    assert table.power_w(0, 0, 8, 2000) == pytest.approx(4 * 441, rel=0.03)
    assert table.power_w(0, 0, 512, 100_000) == pytest.approx(4 * 623, rel=0.03)


@pytest.mark.parametrize("table", measured_tables(), ids=lambda table: f"{table.fit.model} {table.fit.hardware}")
def test_every_measured_table_states_its_errors(table: StepTable) -> None:
    fit = table.fit
    assert fit.points >= 3
    assert 0.0 <= fit.mean_error <= 0.04
    assert fit.mean_error <= fit.largest_error < 0.32
    assert fit.held_out_mean_error is not None
    assert fit.held_out_mean_error < 0.17
    assert outside(fit, sequences=10_000) is not None


# From one machine to another, how far off scaled prompts and decodes are in the mean, as the module states.
SCALED = [
    (("llama-2-70b", "a100-80g", 8), ("h100", 8), 0.05, 0.04),
    (("llama-2-70b", "a100-80g", 2), ("h100", 2), 0.11, 0.13),
    (("llama-2-70b", "h100", 2), ("a100-80g", 2), 0.12, 0.15),
    (("llama-2-70b", "h100", 4), ("a100-80g", 4), 0.07, 0.07),
    (("bloom-176b", "a100-80g", 8), ("h100", 8), 0.08, 0.10),
    (("llama-3.1-8b", "h100", 1), ("b200", 1), None, 0.13),
    (("llama-3.1-70b", "h100", 4), ("b200", 2), None, 0.09),
    (("qwen3-8b", "b200", 1), ("h100", 1), None, 0.30),
    (("opt-66b", "a100-80g", 8), ("a100-80g", 2), 0.37, 0.36),
    (("llama-2-70b", "a100-80g", 8), ("a100-80g", 2), 0.41, 1.35),
]


@pytest.mark.parametrize(("source", "target", "prompts", "decodes"), SCALED)
def test_scaling_is_right_within_what_is_stated(
    source: tuple[str, str, int], target: tuple[str, int], prompts: float | None, decodes: float
) -> None:
    measured = table_for(source[0], *target)
    scaled = scaled_to(table_for(*source), accelerator(target[0]), target[1])
    off = [scaled.decode_step_s(b, b * 512) / measured.decode_step_s(b, b * 512) - 1 for b in (8, 16, 32, 64)]
    assert statistics.fmean(map(abs, off)) <= decodes, off
    if prompts is not None:
        off = [scaled.prefill_s(tokens) / measured.prefill_s(tokens) - 1 for tokens in (512, 1024, 2048)]
        assert statistics.fmean(map(abs, off)) <= prompts, off


def test_other_machines_are_scaled_from_the_nearest_and_say_so() -> None:
    table, source = table_for("llama-3.1-70b", "h200", 4), table_for("llama-3.1-70b", "h100", 4)
    assert table.fit.derived.startswith("scaled by roofline from 4 x h100: prompts x 1, decode x 0.7")
    assert table.fit.hardware == "h200"
    assert table.decode_step_s(8, 8000) < source.decode_step_s(8, 8000)
    assert table.power_w(0, 0, 64, 30_000) == source.power_w(0, 0, 64, 30_000)


def test_a_machine_of_as_many_devices_goes_before_one_of_the_same_kind() -> None:
    assert "from 4 x h100" in table_for("llama-3.1-70b", "b200", 4).fit.derived


def test_a_model_that_nobody_measured_is_the_roofline() -> None:
    table, model = table_for("mistral-7b", "l4"), roofline(model_shape("mistral-7b"), accelerator("l4"))
    assert table.fit.derived == "not measured: roofline"
    assert table.prefill_s(700, 60) == model.prefill_s(700, 60)
    assert table.decode_span_s(8, 4000, 100) == model.decode_span_s(8, 4000, 100)


@pytest.mark.parametrize("device", ACCELERATORS)
@pytest.mark.parametrize("shape", MODELS)
def test_every_shape_on_every_device_has_a_sound_table(shape: str, device: str) -> None:
    table = table_for(shape, device)
    assert 0.0 < table.decode_step_s(1, 512) < table.decode_step_s(64, 64 * 2048)
    assert table.prefill_s(64) < table.prefill_s(2048)
    assert 0.0 < table.idle_w < table.power_w(0, 0, 8, 8000) < 1.05 * accelerator(device).tdp_w
    assert table.fit.model == shape
    assert table.affine().decode_step_s(8, 8000) > 0.0


def test_unknown_names_and_devices_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="'llama-9' is not known"):
        table_for("llama-9", "h100")
    with pytest.raises(InvalidConfig, match="'h900' is not known"):
        table_for("llama-2-7b", "h900")
    with pytest.raises(InvalidConfig, match="tensor_parallel 3 does not divide 64"):
        table_for("llama-2-70b", "a100-80g", 3)
