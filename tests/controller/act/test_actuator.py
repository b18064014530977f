"""What orders do to processes that several replicas share."""

import asyncio

import pytest

from cluster.actions import DrainReplica, Reason, StartReplica
from cluster.fleet import Fleet, ModelSpec, NodeSpec, Pace, ReplicaGroup
from cluster.replica import Role
from controller.act.actuator import Actuator
from controller.act.orders import Orders
from controller.observe.machines import Machines
from controller.observe.watch import Watch
from controller.registry import Registry
from tests.controller.test_registry import replica

GROUP = "tiny/mixed/default"
WHY = Reason(text="why")
PACE = Pace(shape="llama-3.1-8b", accelerator="h100")
FLEET = Fleet(
    models=(ModelSpec(name="tiny", path="tiny"),),
    nodes=(NodeSpec(name="a", slots=8),),
    replicas=(ReplicaGroup(role=Role.MIXED, engine="emulated", pace=PACE, count=4, per_worker=4),),
)
SHARED = "worker-mixed-a-0"


class FakeHosts:
    """Hears everything, and says what it heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []

    async def start(self, worker_id, node, plan) -> None:
        self.heard.append(("start", worker_id, plan.replica_id))

    async def drain(self, worker_id, replica_id, within_s) -> None:
        self.heard.append(("drain", worker_id, replica_id, within_s))

    async def end(self, worker_id, node) -> None:
        self.heard.append(("end", worker_id))


class World:
    def __init__(self) -> None:
        self.hosts = FakeHosts()
        self.registry = Registry("r", 1, lambda: self.watch.table_changed())
        self.watch = Watch(self.registry, Machines(lambda: 10.0), {"a": "default"}, lambda: 10.0)
        self.actuator = Actuator(FLEET, self.hosts, Orders({GROUP: 100.0}), self.registry, self.watch, lambda: 10.0)

    async def begin(self, *actions) -> None:
        self.actuator.apply(1, actions)
        await asyncio.sleep(0)
        self.hosts.heard.clear()

    async def end(self, replica_id: str) -> list[tuple[object, ...]]:
        self.actuator.end(replica_id, "a")
        await asyncio.sleep(0)
        return self.hosts.heard


def start(number: int) -> StartReplica:
    return StartReplica(replica_id=f"mixed-default-{number}", group=GROUP, node="a", reason=WHY)


@pytest.fixture
def world() -> World:
    return World()


async def test_a_start_that_is_given_up_takes_no_other_start_of_its_process_with_it(world: World):
    await world.begin(start(0), start(1))
    assert await world.end("mixed-default-0") == [("drain", SHARED, "mixed-default-0", 0.0)]


async def test_a_start_that_is_given_up_takes_nobody_with_it_who_serves_in_its_process(world: World):
    await world.begin(start(1))
    world.registry.register((replica("mixed-default-0", SHARED),))
    assert await world.end("mixed-default-1") == [("drain", SHARED, "mixed-default-1", 0.0)]


async def test_whoever_is_alone_in_a_process_is_ended_with_it(world: World):
    await world.begin(start(0))
    assert await world.end("mixed-default-0") == [("end", SHARED)]


async def test_a_start_that_was_told_to_drain_is_gone(world: World):
    await world.begin(start(0))
    drain = DrainReplica(replica_id="mixed-default-0", deadline_s=70.0, reason=WHY)
    world.actuator.apply(2, [drain])
    await asyncio.sleep(0)
    assert world.watch.started == {}
