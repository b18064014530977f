"""The loop over a cluster that exists in this file alone: it converges, and goes on from its journal wherever it was cut."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from cluster.actions import Action, ChangeRole, DrainReplica, ScaleRole, StartReplica
from cluster.fleet import PipelineSpec, PolicySpec
from cluster.replica import Phase, Role
from cluster.snapshot import ClusterSnapshot, FailedStart, Hold, ReplicaState
from controller.act.orders import Settled
from controller.controller import Controller, Course, recall
from controller.explanation import replay
from controller.journal import Journal
from controller.memory import Memory, with_failed_starts, with_hold, with_start, without_hold
from controller.pipelines import as_text, build
from policies.pipeline import Pipeline
from tests.policies.clusters import NOW_S, cluster, group, steady

GROUPS = (group(Role.PREFILL, 1, min_replicas=1), group(Role.DECODE, 1))
SPEC = PipelineSpec()
FAST = PipelineSpec(guards=(PolicySpec(use="policies.guards:Capacity"),))


class Cluster:
    """Replicas start and end at once. It counts every start, to see none happen twice."""

    def __init__(self) -> None:
        self.replicas: dict[str, ReplicaState] = {}
        self.started: list[str] = []
        self.rate_rps = 2.0
        self.now_s = NOW_S
        self.deaf = False

    async def observe(self, memory: Memory) -> ClusterSnapshot:
        await asyncio.sleep(0)
        self.now_s += 1.0
        groups = [msgspec.structs.replace(one, **known(memory, one)) for one in GROUPS]
        return cluster(
            groups,
            [steady(self.rate_rps)],
            replicas=tuple(self.replicas[name] for name in sorted(self.replicas)),
            now_s=self.now_s,
            pass_number=memory.pass_number,
            next_replica=memory.next_replica,
            holds=tuple(hold for hold in memory.holds if hold.expires_s > self.now_s),
            failed_starts=memory.failed_starts,
        )

    def apply(self, number: int, actions: Sequence[Action]) -> None:
        for action in () if self.deaf else actions:
            match action:
                case StartReplica():
                    self.started.append(action.replica_id)
                    role = next(one.role for one in GROUPS if one.name == action.group)
                    state = ReplicaState(
                        replica_id=action.replica_id,
                        group=action.group,
                        role=role,
                        phase=Phase.READY,
                        node=action.node,
                        phase_since_s=self.now_s,
                    )
                    self.replicas[action.replica_id] = state
                case DrainReplica():
                    self.replicas.pop(action.replica_id, None)
                case ChangeRole():
                    old = self.replicas[action.replica_id]
                    self.replicas[action.replica_id] = msgspec.structs.replace(old, role=action.role, group=action.target)

    def settle(self, snapshot: ClusterSnapshot, memory: Memory) -> Settled:
        return Settled(memory=memory)

    def count(self, role: Role) -> int:
        return sum(one.role is role for one in self.replicas.values())


def known(memory: Memory, of) -> dict:
    remembered = msgspec.structs.asdict(memory.of(of.name, of.wanted))
    return {name: value for name, value in remembered.items() if value is not None}


def controller(world: Cluster, journal: Journal, spec: PipelineSpec = SPEC, pipeline: Pipeline | None = None, **more) -> Controller:
    course = Course(
        pipeline=pipeline or build(spec),
        text=as_text(spec),
        mode=more.pop("mode", "act"),
        challengers=more.pop("challengers", {}),
    )
    fields = {"memory": recall(journal), "epoch": 1, "clock": lambda: world.now_s}
    return Controller(world, world, journal, course, **{**fields, **more})


async def passes(one: Controller, count: int) -> None:
    for _ in range(count):
        await one.once()


async def test_fleet_grows_with_the_load_and_shrinks_after_it(tmp_path: Path):
    world, journal = Cluster(), Journal(tmp_path / "j")
    loop = controller(world, journal)
    await passes(loop, 3)
    assert (world.count(Role.PREFILL), world.count(Role.DECODE)) == (1, 1)
    world.rate_rps = 60.0
    await passes(loop, 20)
    grown = len(world.replicas)
    assert grown > 4
    world.rate_rps = 2.0
    await passes(loop, 300)
    assert len(world.replicas) == 2
    assert all(difference is None for _, difference in replay(journal))


@pytest.mark.parametrize("cut", range(1, 12))
async def test_restarted_anywhere_it_ends_alike_and_starts_nothing_twice(tmp_path: Path, cut: int):
    async def run(name: str, cuts: bool) -> Cluster:
        world, journal = Cluster(), Journal(tmp_path / name)
        loop = controller(world, journal)
        for number in range(24):
            world.rate_rps = 2.0 if number < 4 else 60.0
            if cuts and number == cut:
                journal.close()
                journal = Journal(tmp_path / name)
                loop = controller(world, journal, epoch=2)
            await loop.once()
        return world

    whole, restarted = await run("whole", False), await run("cut", True)
    assert restarted.started == whole.started
    assert len(set(restarted.started)) == len(restarted.started)
    assert restarted.replicas.keys() == whole.replicas.keys()


async def test_actions_lost_with_their_controller_are_done_by_the_next(tmp_path: Path):
    world, journal = Cluster(), Journal(tmp_path / "j")
    loop = controller(world, journal)
    await passes(loop, 2)
    world.rate_rps, world.deaf = 60.0, True
    await loop.once()
    world.deaf = False
    again = controller(world, journal, epoch=2)
    await passes(again, 20)
    assert again.memory.groups["m/decode/p"].wanted == world.count(Role.DECODE) > 1
    assert len(set(world.started)) == len(world.started)


async def test_advice_changes_nothing_and_is_written_down(tmp_path: Path):
    world, journal = Cluster(), Journal(tmp_path / "j")
    await passes(controller(world, journal), 2)
    world.rate_rps = 60.0
    adviser = controller(world, journal, mode="advise")
    await passes(adviser, 5)
    assert len(world.replicas) == 2
    assert journal.last().mode == "advise"
    assert journal.last().decision.actions
    assert adviser.memory.groups["m/decode/p"].wanted == 1


async def test_challengers_decide_on_the_same_snapshots(tmp_path: Path):
    world, journal = Cluster(), Journal(tmp_path / "j")
    loop = controller(world, journal, challengers={"fast": build(FAST)})
    await passes(loop, 2)
    world.rate_rps = 300.0
    await passes(loop, 1)
    last = journal.last()
    assert last.shadows["fast"].targets["m/decode/p"] > last.decision.targets["m/decode/p"]
    assert len(world.replicas) == 2 + len([one for one in last.decision.actions if isinstance(one, StartReplica)])


class Broken(msgspec.Struct, frozen=True):
    emergency: bool = False

    def decide(self, snapshot, accepted) -> Sequence[ScaleRole]:
        raise KeyError("load")


async def test_policy_that_raises_is_counted_and_changes_nothing(tmp_path: Path):
    world, journal = Cluster(), Journal(tmp_path / "j")
    await passes(controller(world, journal), 2)
    loop = controller(world, journal, pipeline=Pipeline(policies=(Broken(),), guards=()))
    await passes(loop, 2)
    assert (loop.failures, len(world.replicas)) == (2, 2)
    assert "KeyError" in journal.last().decision.failed


async def test_fleet_is_controlled_on_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    world, journal = Cluster(), Journal(tmp_path / "j")
    loop = controller(world, journal)
    await passes(loop, 2)

    def full(entry) -> None:
        raise OSError("journal j: database or disk is full")

    monkeypatch.setattr(journal, "write", full)
    monkeypatch.setattr(journal, "add", full)
    world.rate_rps = 60.0
    await passes(loop, 10)
    assert loop.unwritten == 10
    assert len(world.replicas) > 4


async def test_observer_that_fails_costs_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    world, journal = Cluster(), Journal(tmp_path / "j")
    loop = controller(world, journal, period_s=0.0)
    seen = asyncio.Event()
    observe = world.observe

    async def sometimes(memory: Memory) -> ClusterSnapshot:
        if memory.pass_number == 2 and loop.failures == 0:
            raise RuntimeError("registry is away")
        if memory.pass_number == 5:
            seen.set()
        return await observe(memory)

    monkeypatch.setattr(world, "observe", sometimes)
    running = asyncio.create_task(loop.run())
    await seen.wait()
    running.cancel()
    assert loop.failures == 1


async def test_an_operators_word_counts_from_the_next_pass_and_is_written_when_it_is_acknowledged(tmp_path: Path):
    world, journal = Cluster(), Journal(tmp_path / "j")
    loop = controller(world, journal)
    pin = Hold(kind="pin", target="m/decode/p", replicas=3, author="ada", expires_s=NOW_S + 1000.0)
    said = asyncio.create_task(loop.say(lambda memory: with_hold(memory, pin)))
    await asyncio.sleep(0)
    assert not said.done()
    await loop.once()
    await said
    assert journal.last().snapshot.holds == (pin,)
    assert recall(journal).holds == (pin,)
    assert world.count(Role.DECODE) == 3


async def test_a_word_said_during_a_pass_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    world, journal = Cluster(), Journal(tmp_path / "j")
    loop = controller(world, journal)
    hold = Hold(kind="pause", author="ada", expires_s=NOW_S + 1000.0)
    observe, said = world.observe, []

    async def interrupted(memory: Memory) -> ClusterSnapshot:
        if not said:
            said.append(asyncio.create_task(loop.say(lambda memory: with_hold(memory, hold))))
        return await observe(memory)

    monkeypatch.setattr(world, "observe", interrupted)
    await passes(loop, 2)
    await said[0]
    assert journal.last().snapshot.holds == (hold,)


def test_memory_of_starts_failures_and_hands():
    memory = Memory(groups={"g": Memory().of("g", 1)})
    once = with_start(memory, "g", 40.0)
    assert once.groups["g"].startup_s == 40.0
    assert with_start(once, "g", 20.0).groups["g"].startup_s == 34.0
    old, new = (FailedStart(group="g", node="n", at_s=at_s) for at_s in (0.0, 4000.0))
    assert with_failed_starts(with_failed_starts(memory, [old]), [new, new]).failed_starts == (new,)
    pin = Hold(kind="pin", target="g", replicas=2, author="ada", expires_s=9.0)
    repinned = with_hold(with_hold(memory, pin), msgspec.structs.replace(pin, replicas=5))
    assert [hold.replicas for hold in repinned.holds] == [5]
    assert without_hold(repinned, ["pin"], "g").holds == ()


def test_empty_journal_is_an_empty_memory(tmp_path: Path):
    assert recall(Journal(tmp_path / "j")) == Memory()
