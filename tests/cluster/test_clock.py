from __future__ import annotations

import pytest

from cluster.clock import POWER_EXPONENT, at_clock
from cluster.errors import InvalidConfig
from cluster.measured import table_for
from cluster.step_table import StepTable

ALL = [("bloom-176b", "h100", 8), ("llama-3.1-8b", "h100", 1), ("qwen3-0.6b", "l4", 1)]


@pytest.fixture(params=ALL, ids=lambda param: param[0])
def table(request: pytest.FixtureRequest) -> StepTable:
    return table_for(*request.param)


@pytest.mark.parametrize("share", [0.77, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("tokens", [512, 3000, 16_384])
def test_prompts_last_as_much_longer_as_the_clock_is_lower(table: StepTable, share: float, tokens: int) -> None:
    assert at_clock(table, share).prefill_s(tokens) == pytest.approx(table.prefill_s(tokens) / share, rel=1e-9)


def test_decode_steps_last_the_same(table: StepTable) -> None:
    assert at_clock(table, 0.8).decode_step_s(32, 40_000) == table.decode_step_s(32, 40_000)


def test_the_published_cap_is_met() -> None:
    table = table_for("bloom-176b", "h100", 8)
    capped = at_clock(table, 1 / 1.3)
    assert capped.prefill_s(2048) == pytest.approx(1.3 * table.prefill_s(2048))
    tdp_w = 8 * 700
    assert capped.power_w(2048, 0, 0, 0) == pytest.approx(0.7 * tdp_w, rel=0.02)


def test_an_a100_at_the_lowest_rung_of_polca_saves_about_what_was_published() -> None:
    dynamic = 0.8 * (1 - (1110 / 1410) ** POWER_EXPONENT)
    assert 0.20 <= dynamic <= 0.26


def test_a_lower_clock_says_so() -> None:
    assert at_clock(table_for("bloom-176b", "a100-80g", 8), 0.9).fit.derived.startswith("clock at 0.9 of its maximum")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.76, 1.01, float("nan")])
def test_a_clock_of_which_nothing_was_published_is_refused(share: float) -> None:
    with pytest.raises(InvalidConfig, match=r"clock share .* is outside \[0\.769, 1\]"):
        at_clock(table_for("bloom-176b", "h100", 8), share)
