"""Machines and workers that exist in this file alone, in a time of their own, around a real controller that can be killed anywhere.

The controller runs on a loop whose every step is ours to run: each is a task's way from one await to the next. Killing it is to run
no further step; what it had ordered by then is done, what it had not is not.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from cluster.actions import Action, ChangeRole, Reason, ScaleRole
from cluster.errors import Fenced, Unreachable
from cluster.fleet import ControlSpec, Fleet, GatewaySpec, ModelSpec, NodeSpec, Pace, PipelineSpec, PolicySpec, ReplicaGroup
from cluster.placement import ReplicaPlan
from cluster.replica import Load, Phase, Replica, Role
from cluster.snapshot import ClusterSnapshot
from controller.act.hosts import Inventory
from controller.fleet_controller import FleetController, write_fleet
from transports.messages import Report
from workers.build_engine import performance_of

START_S = 2.0
REPORT_S = 1.0
ANSWER_S = 0.01
STREAM_S = 3.0
PACE = Pace(shape="llama-3.1-8b", accelerator="h100")


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """A policy that wants what it is told from a time on: replicas of each group, or one replica in another role."""

    at_s: float
    prefill: int = 1
    decode: int = 2
    change: bool = False
    emergency: bool = False

    def decide(self, snapshot: ClusterSnapshot, accepted: Sequence[Action]) -> Sequence[Action]:
        reason = Reason(text="by the script")
        now = snapshot.now_s >= self.at_s
        groups = {group.role: group for group in snapshot.groups}
        decode, prefill = groups[Role.DECODE], groups[Role.PREFILL]
        if now and self.change and prefill.wanted == 1:
            (victim, *_) = sorted(one.replica_id for one in snapshot.replicas_by_group[decode.name] if one.phase is Phase.READY)
            return [ChangeRole(replica_id=victim, role=Role.PREFILL, source=decode.name, target=prefill.name, reason=reason)]
        wanted = {decode.name: decode.wanted, prefill.name: prefill.wanted}
        if now and not self.change:
            wanted = {decode.name: self.decode, prefill.name: self.prefill}
        return [ScaleRole(group=name, replicas=count, reason=reason) for name, count in wanted.items()]


def fleet_of(script: Script) -> Fleet:
    group = ReplicaGroup(role=Role.PREFILL, engine="emulated", pace=PACE, count=1, min_replicas=0, max_replicas=8)
    settings = msgspec.to_builtins(script)
    return Fleet(
        name="chaos",
        models=(ModelSpec(name="m", path="m"),),
        nodes=(NodeSpec(name="a", slots=8), NodeSpec(name="b", slots=8)),
        replicas=(group, msgspec.structs.replace(group, role=Role.DECODE, count=2)),
        gateway=GatewaySpec(allow_anonymous=True),
        control=ControlSpec(
            pipeline=PipelineSpec(policies=(PolicySpec(use="tests.chaos.world:Script", settings=settings),), guards=())
        ),
    )


class FakeWorker:
    """One process with one replica, that serves one stream after the other while it is READY and decodes."""

    def __init__(self, worker_id: str, node: str, plan: ReplicaPlan, now_s: float, pid: int) -> None:
        self.worker_id, self.node, self.plan, self.pid = worker_id, node, plan, pid
        self.phase = Phase.STARTING
        self.ready_at_s = now_s + START_S
        self.streams_until_s = 0.0
        self.then: Callable[[], None] | None = None
        """What follows once its streams have ended."""
        self.epoch = 0
        self.ready_since_s: float | None = None
        self.reported_s = 0.0

    @property
    def row(self) -> Replica:
        group = self.plan.group
        return Replica(
            replica_id=self.plan.replica_id, worker_id=self.worker_id, node=self.node, endpoint=self.worker_id, pid=self.pid,
            role=group.role, phase=self.phase, model="m", engine="emulated", performance=performance_of(PACE), kv_blocks=64,
            context_tokens=1024, max_running=8, step_budget_tokens=512, ready_since_s=self.ready_since_s,
        )  # fmt: skip

    @property
    def load(self) -> Load:
        return Load(
            replica_id=self.plan.replica_id, sequence=1, at_s=0.0, phase=self.phase, running=0, waiting=0, waiting_tokens=0,
            kv_tokens=0, kv_blocks_used=0,
        )  # fmt: skip


class World:
    def __init__(self, directory: Path, script: Script) -> None:
        self.directory = directory
        self.now_s = 1000.0
        self.workers: dict[str, FakeWorker] = {}
        self.started: Counter[str] = Counter()
        self.lost_streams = 0
        self.controller: FleetController | None = None
        self.loop: SteppedLoop | None = None
        self.watchers: dict[str, Link] = {}
        self.loops: list[SteppedLoop] = []
        self._pids = 100
        write_fleet(directory, fleet_of(script))

    def new_controller(self) -> None:
        """Another process, that knows the directory and nothing else."""
        self.watchers.clear()
        self.loop = SteppedLoop(self)
        self.loops.append(self.loop)
        with self.loop.current():
            hosts = lambda fleet, epoch: FakeHosts(self, epoch)  # noqa: E731
            self.controller = FleetController(self.directory, hosts, self, clock_from=lambda least_s: self.clock)
            self.controller._serve = _nothing  # It would listen on a real port.
            self.running = self.loop.create_task(self.controller.run())

    def clock(self) -> float:
        return self.now_s

    def run(self, until_s: float, kill_at: int | None = None) -> int:
        """Until a time, or until so many steps have been run. How many were run."""
        steps = 0
        while self.now_s < until_s:
            if self.loop.step():
                steps += 1
                if steps == kill_at:
                    return steps
            else:
                self.now_s = min(until_s, self.loop.next_timer_s(), self.now_s + 0.1)
                self.live()
        return steps

    def close(self) -> None:
        """All is over: what the dead controllers were at is let go."""
        self.controller.registry.deregister = lambda worker_id: None
        for loop in self.loops:
            while tasks := asyncio.all_tasks(loop):
                for task in tasks:
                    task.cancel()
                while loop.step():
                    pass
                self.now_s += 1.0
            loop.close()

    # The workers' own lives

    def live(self) -> None:
        with self.loop.current():
            for worker in list(self.workers.values()):
                self._live(worker)

    def _live(self, worker: FakeWorker) -> None:
        if worker.phase is Phase.STARTING and self.now_s >= worker.ready_at_s:
            worker.phase, worker.ready_since_s = Phase.READY, self.now_s
            self.register(worker)
        if worker.then is not None and self.now_s >= worker.streams_until_s:
            worker.then()
            worker.then = None
        elif worker.phase is Phase.READY and worker.plan.group.role.decodes and self.now_s >= worker.streams_until_s:
            worker.streams_until_s = self.now_s + STREAM_S
        if worker.worker_id in self.workers and self.now_s - worker.reported_s >= REPORT_S and worker.phase is not Phase.STARTING:
            worker.reported_s = self.now_s
            link = self.watchers.get(worker.worker_id)
            if link is None:
                self.register(worker)
            else:
                link.say(Report(loads=(worker.load,)))

    def register(self, worker: FakeWorker) -> None:
        try:
            worker.epoch = max(worker.epoch, self.controller.register((worker.row,)))
        except Fenced:
            self.end(worker.worker_id)

    def begin(self, worker_id: str, node: str, plan: ReplicaPlan, epoch: int) -> None:
        if worker_id not in self.workers:
            self._pids += 1
            self.started[plan.replica_id] += 1
            self.workers[worker_id] = FakeWorker(worker_id, node, plan, self.now_s, self._pids)
        self.obey(worker_id, epoch)

    def obey(self, worker_id: str, epoch: int) -> FakeWorker:
        worker = self.workers.get(worker_id)
        if worker is None:
            raise Unreachable(f"{worker_id} is gone")
        if epoch < worker.epoch:
            raise Fenced("of an epoch that is over")
        worker.epoch = epoch
        return worker

    def end(self, worker_id: str) -> None:
        worker = self.workers.pop(worker_id, None)
        if worker is not None:
            self.lost_streams += worker.streams_until_s > self.now_s
            self.watchers.pop(worker_id, None)
            self.controller.registry.deregister(worker_id)

    def drain(self, worker: FakeWorker) -> None:
        worker.phase = Phase.DRAINING
        worker.then = worker.then or (lambda: self.end(worker.worker_id))

    def change(self, worker: FakeWorker, group: ReplicaGroup) -> None:
        if worker.plan.group.role is group.role:
            return
        worker.plan, worker.phase = msgspec.structs.replace(worker.plan, group=group), Phase.WARMING

        def ready() -> None:
            worker.phase, worker.ready_since_s = Phase.READY, self.now_s
            self.register(worker)

        worker.then = ready
        self.register(worker)

    # Transport

    async def connect(self, endpoint: str, gateway_id: str) -> Link:
        await asyncio.sleep(ANSWER_S)
        if endpoint not in self.workers:
            raise Unreachable(endpoint)
        link = self.watchers[endpoint] = Link()
        return link


async def _nothing() -> None:
    await asyncio.sleep(0)


class Link:
    """A worker's stream to whoever watches it."""

    def __init__(self) -> None:
        self._said: list[Report] = []
        self._news = asyncio.Event()

    def say(self, report: Report) -> None:
        self._said.append(report)
        self._news.set()

    async def messages(self) -> AsyncIterator[Report]:
        while True:
            await self._news.wait()
            self._news.clear()
            said, self._said = self._said, []
            for report in said:
                yield report

    async def close(self) -> None:
        await asyncio.sleep(0)


class FakeHosts:
    """Every order takes a while to arrive, and a while to be answered: a controller may die before, between and after."""

    def __init__(self, world: World, epoch: int) -> None:
        self._world, self._epoch = world, epoch

    async def start(self, worker_id: str, node: NodeSpec, plan: ReplicaPlan) -> None:
        await self._ordered(lambda: self._world.begin(worker_id, node.name, plan, self._epoch))

    async def drain(self, worker_id: str, replica_id: str, within_s: float) -> None:
        await self._ordered(lambda: self._world.drain(self._world.obey(worker_id, self._epoch)))

    async def change_role(self, worker_id: str, replica_id: str, group: ReplicaGroup, within_s: float) -> None:
        await self._ordered(lambda: self._world.change(self._world.obey(worker_id, self._epoch), group))

    async def end(self, worker_id: str, node: str, pid: int) -> None:
        await self._ordered(lambda: self._world.end(worker_id))

    async def slow(self, worker_id: str, replica_id: str, factor: float) -> None:
        raise AssertionError("nobody asks for it")

    async def probe(self, node: str) -> bool:
        await asyncio.sleep(ANSWER_S)
        return True

    async def inventory(self) -> Inventory:
        await asyncio.sleep(ANSWER_S)
        return Inventory(nodes=frozenset({"a", "b"}), workers=frozenset(self._world.workers))

    async def _ordered(self, order: Callable[[], None]) -> None:
        await asyncio.sleep(ANSWER_S)
        order()
        await asyncio.sleep(ANSWER_S)


class SteppedLoop(asyncio.SelectorEventLoop):
    """Runs a callback when it is told to, in the world's time."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def time(self) -> float:
        return self._world.now_s

    def current(self) -> _Current:
        """Within, it is the running loop of whoever asks."""
        return _Current(self)

    def step(self) -> bool:
        """One callback, if one is due."""
        while self._scheduled and self._scheduled[0].when() <= self._world.now_s:
            self._ready.append(heapq.heappop(self._scheduled))
        while self._ready:
            handle = self._ready.popleft()
            if not handle.cancelled():
                with self.current():
                    handle._run()
                return True
        return False

    def next_timer_s(self) -> float:
        return self._scheduled[0].when() if self._scheduled else np.inf


class _Current:
    def __init__(self, loop: SteppedLoop) -> None:
        self._loop = loop

    def __enter__(self) -> None:
        asyncio._set_running_loop(self._loop)

    def __exit__(self, *_: object) -> None:
        asyncio._set_running_loop(None)
