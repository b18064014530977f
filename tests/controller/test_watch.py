"""Who is given up, when, and that he stays so."""

import pytest

from cluster.errors import Fenced
from cluster.replica import Load, Phase
from controller.observe.machines import Machines
from controller.observe.watch import ENDED_S, FORGET_LOST_S, SILENCE_S, Watch
from controller.registry import Registry
from tests.controller.test_machines import Clock
from tests.controller.test_registry import replica
from transports.messages import Report


class World:
    """Three workers, two of them on node a; the clock is ours."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.machines = Machines(self.clock)
        self.machines.told(frozenset({"a", "b"}))
        self.registry = Registry("r", 1, lambda: self.watch.table_changed())
        self.watch = Watch(self.registry, self.machines, {"a": "pool-a", "b": "pool-b"}, self.clock)
        for name, node in (("w0", "a"), ("w1", "a"), ("w2", "b")):
            self.registry.register((replica(f"of-{name}", name, node=node, pid=int(name[1]) + 100),))
        self.watch.sweep()

    def report(self, *workers: str, phase: Phase = Phase.READY, **more) -> None:
        for worker in workers:
            self.watch.heard(worker, Report(loads=(load(f"of-{worker}", phase, **more),)))

    def pass_s(self, seconds: float, *heard: str) -> list[str]:
        """Time goes by, a sweep each second; who is given up meanwhile."""
        lost = []
        for _ in range(round(seconds)):
            self.clock.now_s += 1.0
            self.report(*heard)
            lost += [loss.worker_id for loss in self.watch.sweep()]
        return lost


def load(name: str, phase: Phase = Phase.READY, **more) -> Load:
    fields = {"sequence": 1, "at_s": 0.0, "running": 0, "waiting": 0, "waiting_tokens": 0, "kv_tokens": 0, "kv_blocks_used": 0}
    return Load(replica_id=name, phase=phase, **{**fields, **more})


@pytest.fixture
def world() -> World:
    return World()


def test_a_silent_worker_is_given_up_within_the_bound_and_the_others_are_not(world: World):
    world.report("w0", "w1", "w2")
    assert world.pass_s(SILENCE_S, "w0", "w1") == []
    assert world.pass_s(1, "w0", "w1") == ["w2"]
    assert [row.worker_id for row in world.registry.table.membership.replicas] == ["w0", "w1"]
    (state,) = world.watch.lost_states()
    assert (state.replica_id, state.phase, state.group) == ("of-w2", Phase.LOST, "tiny/mixed/pool-b")


def test_workers_of_one_node_that_fell_silent_together_are_lost_in_one_sweep(world: World):
    world.pass_s(1, "w0", "w1", "w2")
    world.pass_s(1, "w1", "w2")  # w1 was heard a second later than w0.
    sweeps = [world.pass_s(1, "w2") for _ in range(round(SILENCE_S) + 1)]
    assert [lost for lost in sweeps if lost] == [["w0", "w1"]]
    assert world.machines.alive() == {"b"}


def test_a_worker_that_was_given_up_is_fenced_until_that_is_forgotten(world: World):
    world.pass_s(SILENCE_S + 1, "w0", "w1")
    with pytest.raises(Fenced, match="of-w2"):
        world.registry.register((replica("of-w2", "w2", node="b"),))
    world.clock.now_s += FORGET_LOST_S
    assert world.watch.lost_states() == ()
    world.registry.register((replica("of-w2", "w2", node="b"),))


def test_a_process_that_ray_knows_to_have_ended_is_not_waited_for(world: World):
    world.pass_s(1, "w0", "w1", "w2")
    world.watch.told_running(frozenset({"w0", "w1"}), world.clock.now_s)
    assert world.pass_s(ENDED_S, "w0", "w1") == ["w2"]
    assert "b" in world.machines.alive()


def test_a_list_without_anybody_gives_nobody_up_who_is_heard(world: World):
    world.pass_s(1, "w0", "w1", "w2")
    world.watch.told_running(frozenset(), world.clock.now_s)
    assert world.pass_s(SILENCE_S, "w0", "w1", "w2") == []


def test_a_list_that_is_older_than_a_worker_says_nothing_of_it(world: World):
    world.watch.told_running(frozenset({"w0", "w1", "w2"}), world.clock.now_s)
    world.clock.now_s += 1.0
    world.registry.register((replica("of-w3", "w3", node="b"),))
    assert world.watch.sweep() == ()


def test_a_controller_that_was_held_up_gives_nobody_up_for_it(world: World):
    world.report("w0", "w1", "w2")
    world.clock.now_s += 60.0
    assert world.watch.sweep() == ()
    assert world.pass_s(2, "w0", "w1", "w2") == []


def test_an_engine_that_ended_in_a_living_worker_is_lost_with_it(world: World):
    world.clock.now_s += 1.0
    world.report("w2", phase=Phase.LOST)
    (loss,) = world.watch.sweep()
    assert "engine of of-w2" in loss.why


def test_nonsense_is_dropped_and_counted(world: World):
    mad = (load("of-w2"), load("of-w0", running=-1), load("of-w0", kv_tokens=2**63))
    world.watch.heard("w0", Report(loads=(*mad, load("just-gone"))))
    assert world.watch.nonsense == len(mad)
    assert world.watch.heard_loads == {}


def test_a_start_counts_until_its_replica_registers(world: World):
    world.watch.start("new", "tiny/mixed/pool-b", "b", 5.0)
    assert world.watch.started["new"].node == "b"
    world.registry.register((replica("new", "w9", Phase.WARMING, node="b"),))
    assert world.watch.started == {}


def test_a_start_that_was_given_up_comes_too_late(world: World):
    world.watch.start("new", "tiny/mixed/pool-b", "b", 5.0)
    world.watch.give_up_start("new")
    assert [state.replica_id for state in world.watch.lost_states()] == ["new"]
    with pytest.raises(Fenced):
        world.registry.register((replica("new", "w9", node="b"),))


def test_phases_that_workers_report_reach_the_table(world: World):
    version = world.registry.table.membership.version
    world.clock.now_s += 3.0
    world.report("w1", phase=Phase.DRAINING)
    assert world.registry.table.membership.version == version + 1
    assert world.watch.since_s["of-w1"] == world.clock.now_s
