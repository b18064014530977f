"""Claims about the membership table and who may register in it."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import Fenced
from cluster.performance import PerformanceModel
from cluster.replica import Phase, Replica, Role
from controller.registry import MembershipTable, Registry


def replica(name: str, worker: str, phase: Phase = Phase.READY, **more) -> Replica:
    fields = {
        "node": "a", "endpoint": "127.0.0.1:1", "role": Role.MIXED, "model": "tiny", "engine": "emulated", "kv_blocks": 8,
        "context_tokens": 128, "max_running": 4, "step_budget_tokens": 64,
        "performance": PerformanceModel(step_s=0.0, prefill_token_s=0.0),
    }  # fmt: skip
    return Replica(replica_id=name, worker_id=worker, phase=phase, **{**fields, **more})


def test_a_worker_that_is_removed_takes_its_replicas_and_no_others_with_it():
    table = MembershipTable()
    table.register((replica("r0", "w0"), replica("r1", "w0")))
    table.register((replica("r2", "w1"),))
    assert [row.replica_id for row in table.remove_worker("w0")] == ["r0", "r1"]
    assert [row.replica_id for row in table.membership.replicas] == ["r2"]
    assert table.remove_worker("w0") == ()


def test_what_a_worker_registers_is_all_that_it_hosts():
    table = MembershipTable()
    table.register((replica("r0", "w0"), replica("r1", "w0")))
    table.register((replica("r1", "w0"),))
    assert [row.replica_id for row in table.membership.replicas] == ["r1"]


def test_a_phase_that_is_told_changes_the_row_and_an_unchanged_table_keeps_its_version():
    table = MembershipTable()
    table.register((replica("r0", "w0", Phase.WARMING),))
    version = table.membership.version
    table.phases("w0", {"r0": Phase.WARMING}, 1.0)
    assert table.membership.version == version
    table.phases("w0", {"r0": Phase.READY}, 2.0)
    assert table.membership.version == version + 1
    assert table.membership.replicas[0].ready_since_s == 2.0


def test_a_worker_cannot_change_the_phase_of_anothers_replica():
    table = MembershipTable()
    table.register((replica("r0", "w0"),))
    table.register((replica("r1", "w1"),))
    table.phases("w1", {"r0": Phase.DRAINING}, 1.0)
    assert all(row.phase is Phase.READY for row in table.membership.replicas)


STEPS = st.lists(st.tuples(st.sampled_from(["register", "phase", "remove"]), st.integers(0, 3)), max_size=40)


@given(STEPS)
def test_versions_only_rise_and_rise_with_every_change(steps):
    table = MembershipTable()
    for step, number in steps:
        before = table.membership
        match step:
            case "register":
                table.register((replica(f"r{number}", f"w{number}", Phase.WARMING),))
            case "phase":
                table.phases(f"w{number}", {f"r{number}": Phase.READY}, 1.0)
            case "remove":
                table.remove_worker(f"w{number}")
        after = table.membership
        assert after.version >= before.version
        assert (after.replicas == before.replicas) == (after.version == before.version)


async def test_whoever_waits_is_told_of_the_next_version():
    registry = Registry("name", epoch=3)
    waiting = asyncio.create_task(registry.membership(0, timeout_s=10.0))
    await asyncio.sleep(0)
    assert registry.register((replica("r0", "w0"),)) == 3
    told = await asyncio.wait_for(waiting, 5)
    assert (told.registry, told.version, len(told.replicas)) == ("name", 1, 1)


async def test_an_unchanged_table_is_answered_after_the_wait():
    registry = Registry("name", epoch=1)
    assert (await registry.membership(0, timeout_s=0.01)).version == 0


async def test_gateways_are_known_while_they_ask():
    registry = Registry("name", epoch=1)
    await registry.membership(gateway="127.0.0.1:2")
    await registry.membership(gateway="127.0.0.1:1")
    assert registry.gateways() == ("127.0.0.1:1", "127.0.0.1:2")


def test_a_replica_that_was_given_up_cannot_come_back():
    told = []
    registry = Registry("name", epoch=1, changed=lambda: told.append(True))
    registry.fenced.add("r0")
    with pytest.raises(Fenced, match="r0: given up"):
        registry.register((replica("r0", "w0"), replica("r1", "w0")))
    assert registry.table.membership.replicas == ()
    assert told == []
    registry.register((replica("r2", "w1"),))
    assert told == [True]
