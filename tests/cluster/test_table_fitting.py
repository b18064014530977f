from __future__ import annotations

import msgspec
import pytest

from cluster.errors import InvalidConfig
from cluster.performance import PerformanceModel, causal_pairs
from cluster.piecewise import Knots
from cluster.step_table import AFFINE_FIT, StepTable
from cluster.table_fitting import Given, Measured, Step, fit_table, relative_error, watts_by_batch

FIT = msgspec.structs.replace(AFFINE_FIT, model="m", hardware="h", derived="")
AFFINE = PerformanceModel(step_s=0.01, prefill_token_s=1e-4, prefill_pair_s=1e-8, sequence_s=1e-4, kv_token_s=1e-7)


def prompts(*lengths: int, context: int = 0) -> list[Step]:
    return [Step(tokens, causal_pairs(context, tokens), 0, 0) for tokens in lengths]


def decodes(*batches: int, context: int) -> list[Step]:
    return [Step(0, 0, batch, batch * context) for batch in batches]


STEPS = [
    *prompts(16, 64, 256, 1024),
    *prompts(64, 256, context=1024),
    *decodes(1, 4, 16, 64, context=100),
    *decodes(1, 4, 16, 64, context=1000),
]


def measured(model: PerformanceModel | StepTable, steps: list[Step] = STEPS) -> list[Measured]:
    return [Measured((step,), model.step_time_s(*step)) for step in steps]


def test_an_affine_model_is_found_again() -> None:
    table = fit_table(measured(AFFINE), fit=FIT)
    assert table.fit.largest_error < 1e-9
    assert table.fit.held_out_largest_error == pytest.approx(0.0, abs=1e-9)
    found = table.affine()
    for name in ("step_s", "prefill_token_s", "prefill_pair_s", "sequence_s", "kv_token_s"):
        assert getattr(found, name) == pytest.approx(getattr(AFFINE, name), rel=1e-6)


def test_steps_in_a_row_count_with_their_sum() -> None:
    rows = [
        Measured(tuple(decodes(*[batch] * 5, context=length)), 5 * AFFINE.decode_step_s(batch, batch * length))
        for batch in (1, 8)
        for length in (10, 1000)
    ]
    chunks = (Step(512, causal_pairs(0, 512)), Step(512, causal_pairs(512, 512)), Step(100, causal_pairs(1024, 100)))
    rows += [*measured(AFFINE, prompts(100, 512)), Measured(chunks, sum(AFFINE.step_time_s(*map(int, step)) for step in chunks))]
    assert fit_table(rows, fit=FIT).fit.largest_error < 1e-9


def test_a_bend_is_kept_and_the_error_beyond_it_is_held_out() -> None:
    def bent_s(batch: int) -> float:
        return 0.01 + 1e-5 * batch + 1e-3 * max(0, batch - 16)

    rows = [Measured((Step(0, 0, batch, batch),), bent_s(batch)) for batch in (1, 4, 8, 16, 32, 64)]
    table = fit_table(rows, fit=FIT, given=Given(kv_token_s=0.0))
    assert table.fit.largest_error < 1e-9
    assert table.decode_step_s(48, 0) == pytest.approx(bent_s(48))
    # Without the batch of 16 the bend is not seen.
    assert table.fit.held_out_largest_error > 0.1
    assert table.fit.held_out_points == 4


def test_what_is_given_is_taken_over() -> None:
    given = Given(prefill=((0.0, 0.0), (1.0, 2e-4)), prefill_pair_s=3e-9, kv_token_s=1e-7, idle_w=5.0, prefill_w=9.0)
    table = fit_table(measured(AFFINE, decodes(1, 4, 16, context=100)), fit=FIT, given=given)
    assert (table.prefill, table.prefill_pair_s, table.kv) == (given.prefill, 3e-9, ((0.0, 0.0), (1.0, 1e-7)))
    assert (table.idle_w, table.prefill_w) == (5.0, 9.0)
    assert table.step_s == pytest.approx(0.01)


def test_the_domain_is_that_of_the_points() -> None:
    fit = fit_table(measured(AFFINE), fit=FIT).fit
    assert (fit.prefill_tokens, fit.sequences, fit.kv_tokens) == ((16, 1024), (1, 64), (100, 64_000))
    assert fit_table(measured(AFFINE, decodes(1, 2, context=9)), fit=FIT).fit.prefill_tokens == (0.0, 0.0)


def test_noise_never_makes_a_table_fall() -> None:
    rows = [Measured((Step(0, 0, batch, batch),), 0.02 - 1e-4 * batch) for batch in (1, 4, 16, 64)]
    table = fit_table(rows, fit=FIT)
    assert table.decode_step_s(64, 64) >= table.decode_step_s(1, 1)


def test_errors_are_relative_to_what_was_measured() -> None:
    table = fit_table(measured(AFFINE), fit=FIT)
    (slower,) = [Measured((step,), 2 * AFFINE.step_time_s(*step)) for step in STEPS[:1]]
    assert relative_error(table, slower) == pytest.approx(0.5)


def test_nothing_measured_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="no measurement of m on h"):
        fit_table([], fit=FIT)


def test_watts_go_through_what_was_measured_and_stay_flat_outside() -> None:
    knots: Knots = watts_by_batch([(8.0, 400.0), (8.0, 420.0), (64.0, 600.0)])
    assert knots == ((0.0, pytest.approx(410.0)), (8.0, pytest.approx(410.0)), (64.0, pytest.approx(600.0)), (65.0, knots[2][1]))
    assert watts_by_batch([(8.0, 400.0)]) == ((0.0, 400.0), (8.0, 400.0), (9.0, 400.0))
