"""What becomes of orders, as snapshots show it."""

import msgspec
import pytest

from cluster.actions import ChangeRole, DrainReplica, Reason, ScaleRole, StartReplica
from cluster.node import Node
from cluster.replica import Phase, Role
from cluster.snapshot import ClusterSnapshot, ReplicaState
from controller.act.orders import CHANGE_S, CRASH_S, NODE_GRACE_S, OVERDUE_S, Orders
from controller.memory import GroupMemory, Memory

NOW_S = 1000.0
GROUP, OTHER = "m/decode/p", "m/prefill/p"
WHY = Reason(text="why")
START = StartReplica(replica_id="d0", group=GROUP, node="n0", reason=WHY)
DRAIN = DrainReplica(replica_id="d0", deadline_s=NOW_S + 60.0, reason=WHY)
CHANGE = ChangeRole(replica_id="d0", role=Role.PREFILL, source=GROUP, target=OTHER, reason=WHY)


def seen(phase: Phase | None, at_s: float, *, role: Role = Role.DECODE, alive: bool = True, **more) -> ClusterSnapshot:
    fields = {"group": GROUP, "node": "n0", "phase_since_s": at_s}
    states = () if phase is None else (ReplicaState(replica_id="d0", role=role, phase=phase, **{**fields, **more}),)
    return ClusterSnapshot(now_s=at_s, nodes=(Node(name="n0", pool="p", slots=8, alive=alive),), replicas=states)


@pytest.fixture
def orders() -> Orders:
    return Orders({GROUP: 100.0, OTHER: 100.0})


MEMORY = Memory(groups={GROUP: GroupMemory(wanted=1)})


def told(orders: Orders, snapshot: ClusterSnapshot) -> list[str]:
    return [outcome.outcome for outcome in orders.settle(snapshot, MEMORY).outcomes]


def test_a_start_ends_when_its_replica_is_ready_and_is_learnt_from(orders: Orders):
    orders.begin(7, [ScaleRole(group=GROUP, replicas=1, reason=WHY), START], NOW_S)
    assert told(orders, seen(Phase.STARTING, NOW_S + 5.0)) == []
    settled = orders.settle(seen(Phase.READY, NOW_S + 12.5), MEMORY)
    (outcome,) = settled.outcomes
    assert (outcome.number, outcome.action, outcome.outcome) == (7, 1, "ready after 12.5 s")
    assert settled.memory.groups[GROUP].startup_s == 12.5
    assert orders.open == {}


@pytest.mark.parametrize(
    ("snapshots", "words"),
    [
        ([seen(Phase.LOST, NOW_S + 3.0)], "died while it started"),
        ([seen(Phase.WARMING, NOW_S + 101.0)], "not ready within 100 s"),
        ([seen(Phase.STARTING, NOW_S + at_s, alive=False) for at_s in (1.0, 2.0 + NODE_GRACE_S)], "node n0 is down"),
    ],
)
def test_a_start_that_fails_is_remembered_against_its_node_and_ended(orders: Orders, snapshots, words):
    orders.begin(1, [START], NOW_S)
    for snapshot in snapshots:
        settled = orders.settle(snapshot, MEMORY)
    assert words in settled.outcomes[0].outcome
    assert [(one.group, one.node) for one in settled.memory.failed_starts] == [(GROUP, "n0")]
    assert settled.overdue == ("d0",)


def test_what_a_worker_says_of_its_failure_is_the_outcome(orders: Orders):
    orders.begin(1, [START], NOW_S)
    orders.fail("d0", "model.safetensors is truncated")
    orders.fail("d0", "a later word")
    assert told(orders, seen(Phase.STARTING, NOW_S + 1.0)) == ["failed: model.safetensors is truncated"]


def test_a_drain_ends_when_its_replica_is_gone(orders: Orders):
    orders.begin(1, [DRAIN], NOW_S)
    assert orders.draining == {"d0"}
    assert told(orders, seen(Phase.DRAINING, NOW_S + 1.0)) == []
    assert told(orders, seen(None, NOW_S + 3.0)) == ["gone after 3.0 s"]
    assert orders.draining == frozenset()


def test_a_drain_that_does_not_end_is_ended_by_force(orders: Orders):
    orders.begin(1, [DRAIN], NOW_S)
    late = orders.settle(seen(Phase.DRAINING, DRAIN.deadline_s + OVERDUE_S + 1.0), MEMORY)
    assert (late.overdue, late.outcomes) == (("d0",), ())
    assert told(orders, seen(None, DRAIN.deadline_s + OVERDUE_S + 2.0)) == ["did not end by its deadline, and was ended by force"]


def test_a_change_of_role_ends_when_the_replica_is_ready_in_it(orders: Orders):
    orders.begin(1, [CHANGE], NOW_S)
    assert orders.changing == {"d0": Role.PREFILL}
    assert told(orders, seen(Phase.WARMING, NOW_S + 1.0, role=Role.PREFILL)) == []
    assert told(orders, seen(Phase.READY, NOW_S + 4.0, role=Role.PREFILL)) == ["prefill after 4.0 s"]


def test_a_change_of_role_that_never_comes_is_given_up(orders: Orders):
    orders.begin(1, [CHANGE], NOW_S)
    assert told(orders, seen(Phase.READY, NOW_S + 5.0)) == []
    assert told(orders, seen(Phase.READY, NOW_S + CHANGE_S + 1.0)) == ["failed: the role did not change"]


def test_an_action_that_is_under_way_is_not_begun_again(orders: Orders):
    assert len(orders.begin(1, [START], NOW_S)) == 1
    assert orders.begin(2, [START], NOW_S + 1.0) == []


def test_a_later_order_of_another_kind_stands_for_the_earlier_one(orders: Orders):
    orders.begin(1, [START], NOW_S)
    assert len(orders.begin(2, [DRAIN], NOW_S + 1.0)) == 1
    assert told(orders, seen(None, NOW_S + 2.0)) == ["superseded", "gone after 1.0 s"]


def test_a_replica_lost_soon_after_it_was_ready_is_a_start_that_failed_once(orders: Orders):
    crashed = seen(Phase.LOST, NOW_S, ready_since_s=NOW_S - CRASH_S + 1.0)
    memory = orders.settle(crashed, MEMORY).memory
    assert [(one.node, one.at_s) for one in memory.failed_starts] == [("n0", NOW_S)]
    assert orders.settle(crashed, memory).memory == memory
    old = seen(Phase.LOST, NOW_S, ready_since_s=NOW_S - CRASH_S - 1.0)
    assert orders.settle(old, MEMORY).memory.failed_starts == ()


def test_what_an_earlier_controller_began_is_given_again_in_its_last_form(orders: Orders):
    resumed = orders.resume([(1, 0, NOW_S, START), (2, 0, NOW_S + 1.0, DRAIN)])
    assert [(order.number, order.action) for order in resumed] == [(2, DRAIN)]
    assert msgspec.structs.asdict(DRAIN) == msgspec.structs.asdict(orders.open["d0"].action)
