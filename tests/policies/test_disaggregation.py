"""Apart or together, and in which ratio."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.actions import ChangeRole, ScaleRole
from cluster.node import Node
from cluster.replica import Role
from policies.disaggregation import Disaggregation
from tests.policies.clusters import cluster, group, steady


def decide(prefills: int, decodes: int, load, *, least_prefill: int = 1, **more):
    groups = [group(Role.PREFILL, prefills, min_replicas=least_prefill, **more), group(Role.DECODE, decodes, **more)]
    return Disaggregation().decide(cluster(groups, [load]), ())


def test_prompt_heavy_mix_turns_a_spare_decode_replica_into_a_prefill_replica():
    (action,) = decide(1, 6, steady(12.0, prompt=6000.0, output=20.0))
    assert isinstance(action, ChangeRole)
    assert (action.role, action.source, action.target) == (Role.PREFILL, "m/decode/p", "m/prefill/p")
    assert action.reason.numbers["change_s"] < action.reason.numbers["start_s"]


def test_output_heavy_mix_turns_it_back():
    (action,) = decide(6, 1, steady(25.0, prompt=200.0, output=900.0))
    assert (action.role, action.source) == (Role.DECODE, "m/prefill/p")


def test_nothing_changes_where_nobody_can_spare_one():
    assert decide(2, 1, steady(12.0, prompt=6000.0, output=20.0)) == []


def test_start_that_is_faster_than_a_change_goes_before_it():
    assert decide(1, 6, steady(12.0, prompt=6000.0, output=20.0), startup_s=1.0) == []


def test_full_pool_changes_a_role_though_a_start_would_be_faster():
    groups = [group(Role.PREFILL, 1, startup_s=1.0), group(Role.DECODE, 6, startup_s=1.0)]
    full = cluster(
        groups, [steady(12.0, prompt=6000.0, output=20.0)], nodes=tuple(Node(name=f"n{i}", pool="p", slots=1) for i in range(7))
    )
    (action,) = Disaggregation().decide(full, ())
    assert isinstance(action, ChangeRole)


def test_small_fleet_goes_together_where_that_saves_a_replica():
    actions = decide(1, 1, steady(0.5), least_prefill=0)
    assert [(action.group, action.replicas) for action in actions] == [("m/prefill/p", 0), ("m/decode/p", 1)]
    assert all(isinstance(action, ScaleRole) and action.bundle for action in actions)


def test_operators_floor_keeps_prefill_apart():
    assert decide(1, 1, steady(0.5), least_prefill=1) == []


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(1, 8), st.floats(0.5, 60.0), st.floats(50.0, 6000.0), st.floats(10.0, 900.0))
def test_the_same_flow_never_asks_a_replica_back(prefills, decodes, rate_rps, prompt, output):
    load, given_ = steady(rate_rps, prompt=prompt, output=output), {Role.PREFILL: prefills, Role.DECODE: decodes}
    directions = set()
    for _ in range(12):
        actions = decide(given_[Role.PREFILL], given_[Role.DECODE], load)
        if not actions:
            break
        (action,) = actions
        directions.add(action.role)
        giver = Role.DECODE if action.role is Role.PREFILL else Role.PREFILL
        given_ = {action.role: given_[action.role] + 1, giver: given_[giver] - 1}
    assert len(directions) <= 1


@settings(max_examples=60)
@given(st.floats(0.2, 60.0), st.floats(50.0, 6000.0), st.floats(10.0, 900.0))
def test_arrangement_is_not_taken_back_by_the_same_flow(rate_rps, prompt, output):
    load = steady(rate_rps, prompt=prompt, output=output)
    prefill, decode, changes = 2, 2, 0
    for _ in range(6):
        actions = [action for action in decide(prefill, decode, load, least_prefill=0) if isinstance(action, ScaleRole)]
        if not actions:
            break
        changes += 1
        wanted = {action.group: action.replicas for action in actions}
        prefill, decode = wanted["m/prefill/p"], wanted["m/decode/p"]
    assert changes <= 1
    assert msgspec.json.encode(decide(prefill, decode, load, least_prefill=0))
