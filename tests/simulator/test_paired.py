"""Pairs tell a difference from chance, and say no more than they show."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import InvalidConfig
from controller.config import as_yaml, load_fleet
from controller.pipelines import build
from simulator.case import run
from simulator.paired import challenged, compared, other_differences, winning, words
from simulator.sweep import over_seeds
from tests.simulator.comparing import case, fleet, outcome

pytestmark = pytest.mark.timeout(900)  # Who simulates first waits for the compiler, which takes a minute and more.


def pairs(field: str, gains: list[float], at: float = 0.9):
    """Pairs whose level swings much more than their difference does."""
    levels = [at - 0.1 * (number % 3) for number in range(len(gains))]
    return [(outcome(**{field: level}), outcome(**{field: level + gain})) for level, gain in zip(levels, gains, strict=True)]


def test_small_steady_gain_is_shown_though_levels_swing_more():
    found = compared(pairs("attainment", [0.010, 0.012, 0.014]))
    assert (found.winner, found.by) == ("B", "attainment")
    assert words(found).startswith("B is better in attainment by 1.2 +- 0.5 points")


def test_gain_that_swings_about_zero_is_not_shown():
    found = compared(pairs("attainment", [0.05, -0.04, 0.01]))
    assert (found.winner, found.by) == (None, None)
    assert "no difference shown in attainment" in words(found)
    assert "the same to the last digit in goodput" in words(found)


def test_less_is_better_where_it_is_a_cost():
    found = compared(pairs("usd_per_million_output_tokens", [0.1, 0.11, 0.12]))
    assert (found.winner, found.by) == ("A", "usd_per_million_output_tokens")


def test_attainment_of_no_account_leaves_the_verdict_to_cost():
    one = [
        (outcome(attainment=0.99, kwh=1.0), outcome(attainment=0.9901, kwh=1.0, usd_per_million_output_tokens=3.0)),
        (outcome(attainment=0.98, kwh=1.0), outcome(attainment=0.9802, kwh=1.0, usd_per_million_output_tokens=3.1)),
    ]
    found = compared(one)
    assert (found.winner, found.by) == ("A", "usd_per_million_output_tokens")


def test_cost_does_not_decide_while_attainment_may_differ_by_points():
    costs = [{"usd_per_million_output_tokens": usd} for usd in (3.0, 3.1, 3.2)]
    gains = list(zip((0.05, -0.04, 0.01), costs, strict=True))
    found = compared([(outcome(attainment=0.9), outcome(attainment=0.9 + gain, **cost)) for gain, cost in gains])
    assert found.winner is None
    assert found.undecided == pytest.approx((0.00667 - 0.1120, 0.00667 + 0.1120), abs=2e-3)
    assert compared([(outcome(attainment=0.9), outcome(attainment=0.9 + gain / 50, **cost)) for gain, cost in gains]).winner == "A"


def test_one_pair_is_refused():
    with pytest.raises(InvalidConfig, match="1 pair is below 2"):
        compared([(outcome(), outcome())])


def test_metric_that_a_run_does_not_have_is_left_out():
    found = compared([(outcome(tpot_p90_s=None), outcome()), (outcome(), outcome())])
    assert "tpot_p90_s" not in {one.metric for one in found.differences}


def test_same_policies_on_paired_seeds_do_not_differ_though_seeds_do():
    one, other = (over_seeds(case(), 2) for _ in range(2))
    found = compared([(run(a), run(b)) for a, b in zip(one, other, strict=True)])
    assert all(one.alike for one in found.differences)
    assert any(one.a.half_width for one in found.differences)


def test_challenger_that_won_is_exported_as_a_config_that_decides_the_same(tmp_path: Path):
    won = challenged(fleet(), "calm", "cluster.yaml")
    (tmp_path / "winner.yaml").write_text(as_yaml(winning(won)))
    loaded = load_fleet(tmp_path / "winner.yaml")
    assert build(loaded.control.pipeline) == build(fleet().control.challengers["calm"])
    assert loaded.control.challengers == {}
    assert "up_margin" in loaded.control.pipeline.policies[0].settings or len(loaded.control.pipeline.policies[0].settings) > 1


def test_unknown_challenger_is_refused_with_those_there_are():
    with pytest.raises(InvalidConfig, match=r"has no 'clam'; there are: calm"):
        challenged(fleet(), "clam", "cluster.yaml")


def test_what_else_differs_is_named():
    from tests.simulator.comparing import CLUSTER

    assert other_differences(fleet(), challenged(fleet(), "calm", "")) == []
    assert other_differences(fleet(), fleet(CLUSTER.replace("tpot_s: 0.1", "tpot_s: 0.2"))) == ["slo"]
