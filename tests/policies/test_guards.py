"""What limits may do: drop or weaken, and say why."""

import pytest

from cluster.actions import ChangeRole, Reason, ScaleRole
from cluster.node import Node
from cluster.replica import Phase, Role
from cluster.snapshot import Hold
from policies.guards import Capacity, DisruptionBudget, Paused, RateOfChange, StaleTelemetry
from policies.hands import Hands
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


def test_stale_telemetry_does_not_hold_off_the_groups_own_limits():
    stale = [steady(1.0, age_s=100.0)]
    up = cluster([group(wanted=1, min_replicas=3)], stale)
    verdict = StaleTelemetry().limit(up, [ScaleRole(group="m/mixed/p", replicas=5, reason=WHY)])
    assert [action.replicas for action in verdict.actions] == [3]


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


def drain_all(of, ready: int, elsewhere: int = 0, leaving: int = 0):
    phases = [Phase.READY] * ready + [Phase.DRAINING] * leaving
    members = [replica(f"r{number}", of, phase) for number, phase in enumerate(phases)]
    members += [replica(f"e{number}", of, node="n1") for number in range(elsewhere)]
    hold = Hold(kind="drain", target="n0", author="ada", expires_s=NOW_S + 60)
    snapshot = cluster([of], replicas=tuple(members), holds=(hold,))
    verdict = DisruptionBudget().limit(snapshot, Hands().decide(snapshot, ()))
    return len(verdict.actions)


@pytest.mark.parametrize(
    ("ready", "elsewhere", "leaving", "may"), [(6, 0, 0, 2), (4, 0, 2, 0), (3, 3, 0, 2), (3, 5, 0, 4), (1, 6, 0, 1), (5, 0, 0, 1)]
)
def test_node_is_emptied_no_faster_than_others_stand_in(ready, elsewhere, leaving, may):
    assert drain_all(group(wanted=6), ready, elsewhere, leaving) == min(ready, may)


def test_last_replica_on_a_node_that_is_emptied_waits_for_another():
    assert drain_all(group(wanted=1), 1) == 0
    assert drain_all(group(wanted=1), 1, elsewhere=1) == 1


def test_pin_goes_before_old_telemetry_and_a_pause():
    pin = Hold(kind="pin", target="m/mixed/p", replicas=4, author="ada", expires_s=NOW_S + 60)
    pause = Hold(kind="pause", author="ada", expires_s=NOW_S + 60)
    snapshot = cluster([group(wanted=2)], [steady(5.0, age_s=900.0)], holds=(pause, pin))
    wishes = Hands().decide(snapshot, ())
    for guard in (Paused(), StaleTelemetry()):
        assert guard.limit(snapshot, wishes) == Verdict(actions=tuple(wishes))


def test_replica_that_changes_its_role_counts_as_leaving_until_it_is_ready():
    prefill, decode = group(Role.PREFILL, 2), group(Role.DECODE, 2)
    changing = replica("r0", prefill, Phase.WARMING, ready_since_s=NOW_S - 100.0)
    action = ChangeRole(replica_id="r1", role=Role.PREFILL, source=decode.name, target=prefill.name, reason=WHY)
    assert DisruptionBudget().limit(cluster([prefill, decode], replicas=(changing,)), [action]).actions == ()
    newcomer = replica("r0", prefill, Phase.WARMING)
    assert DisruptionBudget().limit(cluster([prefill, decode], replicas=(newcomer,)), [action]).actions == (action,)


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
