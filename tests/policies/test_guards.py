"""What limits may do: drop or weaken, and say why."""

import pytest

from cluster.actions import ChangeRole, Reason, ScaleRole
from cluster.node import Node
from cluster.replica import Phase, Role
from cluster.snapshot import Hold
from policies.guards import Capacity, DisruptionBudget, Paused, RateOfChange, StaleTelemetry
from policies.policy import Verdict
from tests.policies.clusters import NOW_S, cluster, group, replica, steady

WHY = Reason(text="because")


def limit(guard, to: int, of, **more):
    verdict = guard.limit(cluster([of], **more), [ScaleRole(group=of.name, replicas=to, reason=WHY)])
    return [action.replicas for action in verdict.actions], [one.why for one in verdict.dropped]


def test_pause_keeps_the_target_and_names_who_paused():
    hold = Hold(kind="pause", author="ada", expires_s=NOW_S + 60)
    assert limit(Paused(), 5, group(wanted=2), holds=(hold,)) == ([2], ["paused by ada"])
    assert limit(Paused(), 5, group(wanted=2)) == ([5], [])


def test_stale_telemetry_keeps_the_target():
    old = (steady(5.0, age_s=16.0),)
    assert limit(StaleTelemetry(), 5, group(wanted=2), workloads=old) == ([2], ["telemetry of m is 16 s old, above 15 s"])
    assert limit(StaleTelemetry(), 5, group(wanted=2), workloads=(steady(5.0),)) == ([5], [])


@pytest.mark.parametrize(("wanted", "to", "granted"), [(1, 30, 5), (10, 30, 20), (10, 11, 11), (8, 1, 6), (2, 0, 1), (3, 2, 2)])
def test_steps_have_a_size(wanted, to, granted):
    assert limit(RateOfChange(), to, group(wanted=wanted))[0] == [granted]


def test_steps_down_have_a_distance():
    late = group(wanted=8, changed_down_s=NOW_S - 14.0)
    assert limit(RateOfChange(), 6, late) == ([8], ["the last step down was 14 s ago, below 15 s"])
    assert limit(RateOfChange(), 6, group(wanted=8, changed_down_s=NOW_S - 15.0)) == ([6], [])


def test_only_so_many_leave_at_once():
    of = group(wanted=6)
    members = tuple(replica(f"r{number}", of, Phase.DRAINING if number < 1 else Phase.READY) for number in range(7))
    assert limit(DisruptionBudget(), 3, of, replicas=members) == ([5], ["1 of m/mixed/p are leaving and 2 may"])


def test_role_change_waits_for_another_that_leaves():
    prefill, decode = group(Role.PREFILL, 2), group(Role.DECODE, 2)
    leaving = (replica("r0", prefill, Phase.DRAINING),)
    action = ChangeRole(replica_id="r1", role=Role.DECODE, source=prefill.name, target=decode.name, reason=WHY)
    verdict = DisruptionBudget().limit(cluster([prefill, decode], replicas=leaving), [action])
    assert verdict.actions == ()
    assert len(verdict.dropped) == 1


def arrange(prefills: int, decodes: int, *groups, **more):
    wishes = [
        ScaleRole(group=one.name, replicas=to, reason=WHY, bundle="b") for one, to in zip(groups, (prefills, decodes), strict=True)
    ]
    return wishes, cluster(groups, **more)


@pytest.mark.parametrize("guard", [RateOfChange(), DisruptionBudget()])
def test_an_arrangement_is_judged_by_its_groups_together(guard):
    wishes, snapshot = arrange(0, 7, group(Role.PREFILL, 2), group(Role.DECODE, 6))
    assert guard.limit(snapshot, wishes) == Verdict(actions=tuple(wishes))


def test_an_arrangement_that_moves_too_many_is_stopped_whole():
    wishes, snapshot = arrange(0, 12, group(Role.PREFILL, 10), group(Role.DECODE, 10))
    verdict = DisruptionBudget().limit(snapshot, wishes)
    assert verdict.actions == ()
    assert [one.why for one in verdict.dropped] == ["10 would be leaving and 6 may"] * 2


def test_an_arrangement_keeps_the_distance_of_steps_down():
    wishes, snapshot = arrange(0, 7, group(Role.PREFILL, 2, changed_down_s=NOW_S - 5.0), group(Role.DECODE, 6))
    assert len(RateOfChange().limit(snapshot, wishes).dropped) == 2


def test_pool_grants_what_it_has_places_for():
    nodes = (Node(name="a", pool="p", slots=3), Node(name="b", pool="p", slots=2), Node(name="c", pool="p", slots=9, alive=False))
    assert limit(Capacity(), 9, group(wanted=2), nodes=nodes) == ([5], ["pool p has room for 5 of 9"])


def test_groups_of_one_pool_share_its_places_in_order():
    nodes = (Node(name="a", pool="p", slots=6),)
    groups = [group(Role.PREFILL, 2), group(Role.DECODE, 2)]
    wishes = [ScaleRole(group=one.name, replicas=5, reason=WHY) for one in groups]
    verdict = Capacity().limit(cluster(groups, nodes=nodes), wishes)
    assert [action.replicas for action in verdict.actions] == [4, 2]


def test_node_loss_does_not_take_from_who_is_there():
    assert limit(Capacity(), 4, group(wanted=4), nodes=(Node(name="a", pool="p", slots=3),)) == ([4], [])
