"""What would have turned a decision: the stated value does, and 99 % of the way there does not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.replica import Role
from policies.counterfactual import asked, flips, outcome
from policies.disaggregation import Disaggregation
from policies.guards import Capacity, RateOfChange
from policies.levers import demand, output_length, prompt_length, read, start_up, tpot_slo, ttft_slo, write
from policies.pipeline import Pipeline
from policies.scaling import Scaling
from tests.policies.clusters import cluster, group, steady

PIPELINE = Pipeline(policies=(Disaggregation(), Scaling()), guards=(RateOfChange(), Capacity()))
LEVERS = (demand("m"), prompt_length("m"), output_length("m"), ttft_slo("m"), tpot_slo("m"))


@pytest.mark.parametrize("lever", [*LEVERS, start_up("m/mixed/p")])
def test_what_is_written_is_read_and_nothing_else_changes(lever):
    before = cluster([group()], [steady(5.0)])
    after = write(before, lever, 3.25)
    assert read(after, lever) == pytest.approx(3.25)
    others = [one for one in (*LEVERS, start_up("m/mixed/p")) if one != lever]
    assert [read(after, one) for one in others] == pytest.approx([read(before, one) for one in others])


def test_lever_of_what_is_not_there_reads_nothing():
    assert read(cluster([group()]), demand("m")) is None
    assert read(cluster([group()]), start_up("m/decode/p")) is None


def assert_turning_points_are_true(snapshot, name: str):
    decision = PIPELINE.decide(snapshot)
    wish = asked(decision, name)
    for flip in flips(PIPELINE.decide, snapshot, name, wish.reason.levers):
        there = PIPELINE.decide(write(snapshot, flip.lever, flip.turns_at))
        nearly = PIPELINE.decide(write(snapshot, flip.lever, flip.was + 0.99 * (flip.turns_at - flip.was)))
        assert outcome(there, name) == flip.outcome != outcome(decision, name)
        assert outcome(nearly, name) == outcome(decision, name)


def test_rise_would_not_have_been_with_less_demand():
    snapshot = cluster([group(wanted=1)], [steady(16.0)])
    found = {flip.lever: flip for flip in flips(PIPELINE.decide, snapshot, "m/mixed/p", LEVERS)}
    assert found[demand("m")].turns_at < 16.0
    assert found[demand("m")].outcome == "1 replica"
    assert_turning_points_are_true(snapshot, "m/mixed/p")


def test_role_change_would_not_have_been_with_shorter_prompts():
    groups = [group(Role.PREFILL, 1, min_replicas=1), group(Role.DECODE, 6)]
    snapshot = cluster(groups, [steady(12.0, prompt=6000.0, output=20.0)])
    assert "becomes prefill" in outcome(PIPELINE.decide(snapshot), "m/prefill/p")
    assert_turning_points_are_true(snapshot, "m/prefill/p")


@settings(max_examples=15, deadline=None)
@given(st.floats(0.5, 60.0), st.floats(100.0, 4000.0), st.integers(1, 12))
def test_turning_points_are_true_wherever_a_decision_stands(rate_rps, prompt, wanted):
    assert_turning_points_are_true(cluster([group(wanted=wanted)], [steady(rate_rps, prompt=prompt)]), "m/mixed/p")
