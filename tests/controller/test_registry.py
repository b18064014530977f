"""Claims about the membership table, with its time given."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from cluster.performance import PerformanceModel
from cluster.replica import Phase, Replica, Role
from controller.registry import SILENCE_S, MembershipTable, Registry


def replica(name: str, worker: str, phase: Phase = Phase.READY) -> Replica:
    return Replica(
        replica_id=name, worker_id=worker, node="a", endpoint="127.0.0.1:1", role=Role.MIXED, phase=phase, model="tiny",
        engine="emulated", performance=PerformanceModel(step_s=0.0, prefill_token_s=0.0), kv_blocks=8, context_tokens=128,
        max_running=4, step_budget_tokens=64,
    )  # fmt: skip


def test_a_silent_worker_is_lost_with_its_replicas_and_must_register_again():
    table = MembershipTable()
    table.register((replica("r0", "w0"), replica("r1", "w0")), 0.0)
    table.register((replica("r2", "w1"),), 0.0)
    assert table.heartbeat("w1", {}, SILENCE_S)
    assert table.sweep(SILENCE_S) == ()
    assert [(lost.replica_id, lost.phase) for lost in table.sweep(SILENCE_S + 0.1)] == [("r0", Phase.LOST), ("r1", Phase.LOST)]
    assert [row.replica_id for row in table.membership.replicas] == ["r2"]
    assert not table.heartbeat("w0", {}, SILENCE_S + 0.2)
    table.register((replica("r0", "w0"),), SILENCE_S + 0.3)
    assert table.heartbeat("w0", {}, SILENCE_S + 0.4)


def test_a_heartbeat_changes_phases_and_an_unchanged_table_keeps_its_version():
    table = MembershipTable()
    table.register((replica("r0", "w0", Phase.WARMING),), 0.0)
    version = table.membership.version
    table.heartbeat("w0", {"r0": Phase.WARMING}, 1.0)
    assert table.membership.version == version
    table.heartbeat("w0", {"r0": Phase.READY}, 2.0)
    assert table.membership.version == version + 1
    assert table.membership.replicas[0].ready_since_s == 2.0


def test_a_worker_cannot_change_the_phase_of_anothers_replica():
    table = MembershipTable()
    table.register((replica("r0", "w0"),), 0.0)
    table.register((replica("r1", "w1"),), 0.0)
    table.heartbeat("w1", {"r0": Phase.DRAINING}, 1.0)
    assert all(row.phase is Phase.READY for row in table.membership.replicas)


STEPS = st.lists(
    st.tuples(st.sampled_from(["register", "heartbeat", "deregister", "sweep"]), st.integers(0, 3), st.floats(0.0, 4.0)),
    max_size=40,
)


@given(STEPS)
def test_versions_only_rise_and_rise_with_every_change(steps):
    table, now_s = MembershipTable(), 0.0
    for action, worker, later_s in steps:
        now_s += later_s
        before = table.membership
        match action:
            case "register":
                table.register((replica(f"r{worker}", f"w{worker}"),), now_s)
            case "heartbeat":
                table.heartbeat(f"w{worker}", {f"r{worker}": Phase.DRAINING}, now_s)
            case "deregister":
                table.deregister(f"w{worker}")
            case "sweep":
                table.sweep(now_s)
        after = table.membership
        assert after.version == before.version + (after.replicas != before.replicas)


async def test_a_waiting_gateway_is_told_at_once_and_an_idle_one_gets_what_is_there():
    registry = Registry()
    waiting = asyncio.create_task(registry.membership(0, 20.0))
    await asyncio.sleep(0)
    await registry.register((replica("r0", "w0"),))
    assert (await waiting).version == 1
    assert (await registry.membership(1, 0.01)).version == 1
