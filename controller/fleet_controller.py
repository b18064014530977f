"""The controller of one fleet, put together: registry, watch, loop and hands, on one asyncio loop.

What must survive it is its journal and its config, in one directory; what it controls survives it by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import asdict

from cluster.actions import Decision
from cluster.errors import InvalidConfig, InvalidRequest, MobulaError
from cluster.fleet import Fleet, PipelineSpec, PolicySpec
from cluster.metrics import DEMAND_NAMES, Sample
from cluster.placement import group_of
from cluster.replica import Phase, Replica
from cluster.snapshot import ClusterSnapshot, Hold
from controller.act.actuator import Actuator
from controller.act.hosts import Hosts
from controller.act.orders import Orders
from controller.controller import Controller, Course
from controller.directory import next_epoch, open_journal, read_fleet, remember_port, remembered_port, reopened, write_fleet
from controller.memory import Memory, with_hold, without_hold
from controller.observe.assemble import SPAN_S
from controller.observe.discovery import DiscoveryServer, target_groups
from controller.observe.exporter import ControllerMetrics, Tallies
from controller.observe.feed import Source, TelemetryFeed
from controller.observe.machines import Machines
from controller.observe.observer import Observer
from controller.observe.prometheus import Prometheus
from controller.observe.watch import SILENCE_S, Loss, Watch
from controller.observe.window import Window
from controller.pipelines import as_text, build
from controller.registry import TOGETHER_S, Registry
from controller.status import Change, Failure, FleetStatus, Progress, changes_of, fleet_status
from controller.steady_clock import steady_clock
from controller.taking_over import TakingOver
from policies.guards import StaleTelemetry
from policies.pipeline import Pipeline
from transports.links import WorkerLinks
from transports.messages import WATCHER
from transports.transport import Transport

log = logging.getLogger(__name__)

INVENTORY_S = 1.0
STOCK_S = 10.0  # Ray's head answers within a second, or is being restarted.
PROBE_S = 2.0
END_POLL_S = 0.05
SHOWN_CHANGES = 12
MAX_FAILURES = 100  # That are told to whoever waits for the first start.
MOST_FIGURE = 1e6  # Of a performance model: no step lasts so many seconds, and no replica draws so many watts.

KEEP = PipelineSpec(policies=(PolicySpec(use="policies.keep:Keep"),), guards=(PolicySpec(use="policies.guards:Capacity"),))
"""Brings up a fleet whose controller is to advise only."""
KEEP_TEXT = as_text(KEEP)


class FleetController:
    """Made anew by each restart."""

    def __init__(
        self,
        directory: Path,
        hosts: Callable[[Fleet, int], Hosts],
        transport: Transport,
        *,
        prometheus_url: str | None = None,
        clock_from: Callable[[float], Callable[[], float]] = steady_clock,
    ) -> None:
        """directory: of `fleet.json` and the journal. hosts: made for a fleet and an epoch. prometheus_url: of the fleet's own one.

        clock_from: makes the clock, of Unix seconds that never step back, nor show less than it is given. Raises InvalidConfig.
        """
        self.fleet = read_fleet(directory)
        self._directory = directory
        self._journal, last = open_journal(directory, self.fleet.control.journal_bytes)
        self._last = last
        self.epoch = next_epoch(directory, 0 if last is None else last.epoch)
        self.clock = clock_from(0.0 if last is None else last.snapshot.now_s)
        self._hosts = hosts(self.fleet, self.epoch)
        self.registry = Registry(secrets.token_hex(8), self.epoch, self._table_changed)
        self.machines = Machines(self.clock)
        self.watch = Watch(self.registry, self.machines, {node.name: node.pool for node in self.fleet.nodes}, self.clock)
        self.orders = Orders(_start_timeouts(self.fleet))
        self.actuator = Actuator(self.fleet, self._hosts, self.orders, self.registry, self.watch, self.clock)
        self.window = Window(SPAN_S)
        self._prometheus_url = prometheus_url or self.fleet.telemetry.prometheus_url
        self.feed = TelemetryFeed(self._source(), DEMAND_NAMES, self.clock)
        self._links = WorkerLinks(transport, f"{WATCHER}{self.epoch}", self.watch, silence_s=SILENCE_S)
        self._following = False
        """The table has changed, and is about to be looked at."""
        self._losses = 0
        observer = Observer(
            self.fleet,
            self.registry,
            self.watch,
            self.machines,
            self.orders,
            telemetry=self.feed.latest,
            bury=self._bury,
            clock=self.clock,
            ahead=self._ahead_s,
        )
        self._observer = observer
        self._metrics = ControllerMetrics(self.epoch, self._tallies)
        self._server = DiscoveryServer(self.fleet.name, self._targets, self._metrics.registry)
        self._changes: deque[Change] = deque(maxlen=SHOWN_CHANGES)
        for one in self._journal.changes(most=SHOWN_CHANGES):
            self._changes.extendleft(changes_of(one.number, one.at_s, one.mode, one.decision))
        self._passed: tuple[ClusterSnapshot, Decision] | None = None
        self._failed: dict[str, tuple[str, bool]] = {}
        """Of starts: why, and whether it would happen again."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.controller = Controller(
            observer,
            self.actuator,
            self._journal,
            self._course(),
            memory=Memory(),
            epoch=self.epoch,
            clock=self.clock,
            passed=self._note,
        )

    # Life

    async def run(self) -> None:
        """Takes over from whoever was before, and controls for ever."""
        await self._serve()
        self._do(self.feed.run())
        await self._take_stock()
        self._do(self._keep_stock())
        before = TakingOver(self.fleet, self._journal, self.registry, self.watch, self.actuator, self.orders, self.clock)
        self.controller.memory = await before.memory(self._last)
        await self.controller.run()

    async def _serve(self) -> None:
        """A port that cannot be had is an error of the first start; later, the fleet is controlled on without it."""
        port = self.fleet.control.http_port or remembered_port(self._directory)
        try:
            await self._server.start(port=port)
        except InvalidConfig as error:
            if self._last is None:
                raise
            log.error("%s: no metrics and no service discovery", error)
        else:
            remember_port(self._directory, int(self._server.address.rpartition(":")[2]))

    async def shutdown(self, drain_s: float) -> None:
        """End every worker: what runs may take so long to finish. One that is silent does not finish anything."""
        for task in tuple(self._tasks):
            task.cancel()
        rows = tuple(self.registry.table.membership.replicas)
        nodes = {row.worker_id: row.node for row in rows}
        ends: dict[str, asyncio.Task[None]] = {}

        def end(workers: Iterable[str]) -> None:
            for worker_id in workers:
                ends.setdefault(worker_id, asyncio.create_task(self._hosts.end(worker_id, nodes.get(worker_id, ""))))

        drains = asyncio.gather(*(self._drain(row, drain_s) for row in rows))
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_s + SILENCE_S):
                    while left := (await self._hosts.inventory()).workers & nodes.keys():
                        end(left & self.watch.silent)
                        await asyncio.sleep(END_POLL_S)  # A process that ends tells nobody.
            end((await self._hosts.inventory()).workers)
            await asyncio.gather(*ends.values())
        finally:
            drains.cancel()
            await self._links.close()
            await self._server.close()
            self._journal.close()

    async def _drain(self, row: Replica, drain_s: float) -> None:
        with contextlib.suppress(MobulaError):
            await self._hosts.drain(row.worker_id, row.replica_id, drain_s)

    # What workers and gateways say

    def register(self, replicas: tuple[Replica, ...]) -> int:
        """As `controller.registry.Registry.register`. Raises InvalidRequest for what is not of this fleet."""
        models, nodes = {model.name for model in self.fleet.models}, {node.name for node in self.fleet.nodes}
        for row in replicas:
            if row.model not in models:
                raise InvalidRequest(f"{row.replica_id} serves {row.model}, which is no model of {self.fleet.name}")
            if row.node not in nodes:
                raise InvalidRequest(f"{row.replica_id} runs on {row.node}, which is no node of {self.fleet.name}")
            if bad := [field for field, value in asdict(row.performance).items() if not 0.0 <= value <= MOST_FIGURE]:
                raise InvalidRequest(f"{row.replica_id} says of its performance that {bad[0]} is no number in [0, {MOST_FIGURE:g}]")
        return self.registry.register(replicas)

    def failed(self, replica_id: str, error: str, permanent: bool) -> None:
        """A worker says why it could not start a replica."""
        if len(self._failed) < MAX_FAILURES:
            self._failed[replica_id] = (error, permanent)
        self.orders.fail(replica_id, error)

    def counted(self, gateway: str, samples: Iterable[Sample]) -> None:
        self.window.add(self.clock(), samples)

    # What operators say

    async def hold(self, hold: Hold) -> None:
        """`expires_s` is of this machine's clock, which may have been set since the controller's own began."""
        until_s = hold.expires_s - self._ahead_s()
        kept = msgspec.structs.replace(hold, expires_s=round(until_s, 3))
        await self.controller.say(lambda memory: with_hold(memory, kept))

    async def unhold(self, kinds: Iterable[str], target: str) -> bool:
        """Whether there was such a hold."""
        kinds, found = tuple(kinds), []

        def taken_back(memory: Memory) -> Memory:
            left = without_hold(memory, kinds, target)
            found.append(left != memory)
            return left

        await self.controller.say(taken_back)
        return any(found)

    def reload(self, fleet: Fleet) -> None:
        """Go on by another config, which is known to be possible. All of it or, where it cannot be written, none."""
        course = _course(fleet)
        write_fleet(self._directory, fleet)
        self.fleet = self._observer.fleet = self.actuator.fleet = fleet
        self.watch.pools = {node.name: node.pool for node in fleet.nodes}
        self.orders.start_timeout_s = _start_timeouts(fleet)
        self._journal.max_bytes = fleet.control.journal_bytes
        self.controller.course = course

    # What people ask

    def status(self) -> FleetStatus | None:
        """None before the first pass."""
        if self._passed is None:
            return None
        return fleet_status(
            self.fleet,
            *self._passed,
            self.registry.table.membership,
            _stale_s(self.controller.course.pipeline),
            epoch=self.epoch,
            mode=self.fleet.control.mode,
            gateways=tuple(f"{self.fleet.scheme}://{address}" for address in self.registry.gateways()),
            http_url=f"http://{self._server.address}",
            prometheus_url=self._prometheus_url or "",
            controller_pid=os.getpid(),
            failures=self.controller.failures,
            unwritten=self.controller.unwritten,
            nonsense=self.watch.nonsense,
            changes=tuple(self._with_outcome(change) for change in self._changes),
        )

    def _with_outcome(self, change: Change) -> Change:
        told = [one.outcome for one in self._journal.outcomes(change.number) if one.action == change.index]
        return msgspec.structs.replace(change, outcome=told[-1]) if told else change

    def progress(self) -> Progress:
        """How far the first start is."""
        wanted = sum(spec.count for spec in self.fleet.replicas)
        ready = tuple(row.replica_id for row in self.registry.table.membership.replicas if row.phase is Phase.READY)
        failures = tuple(
            Failure(replica_id=name, error=error, permanent=permanent) for name, (error, permanent) in self._failed.items()
        )
        return Progress(wanted=wanted, ready=ready, failures=failures)

    async def slow(self, replica_id: str, factor: float) -> None:
        worker_id = self.actuator.worker_of(replica_id)
        if worker_id is None:
            raise InvalidRequest(f"no replica {replica_id} is known; `mobula status` names them")
        await self._hosts.slow(worker_id, replica_id, factor)

    # Inside

    def _source(self) -> Source:
        if self._prometheus_url is None:
            return self.window
        return Prometheus(self._prometheus_url, SPAN_S, self.fleet.name, self._ahead_s)

    def _ahead_s(self) -> float:
        """Of the machine's clock, where it was set after the controller's own began."""
        return time.time() - self.clock()

    def _table_changed(self) -> None:
        """Changes that come close together are followed once."""
        if not self._following:
            self._following = True
            asyncio.get_running_loop().call_later(TOGETHER_S, self._follow_table)

    def _follow_table(self) -> None:
        self._following = False
        self.watch.table_changed()
        self._links.update(self.registry.table.membership)

    def _bury(self, loss: Loss) -> None:
        self._losses += 1
        self.actuator.bury(loss)

    async def _keep_stock(self) -> None:
        probing: set[str] = set()

        async def probe(node: str) -> None:
            try:
                answered = await self._hosts.probe(node)
                (self.machines.answered if answered else self.machines.unanswered)(node)
                await asyncio.sleep(0 if answered else PROBE_S)
            finally:
                probing.discard(node)

        while True:
            await asyncio.sleep(INVENTORY_S)
            try:
                await asyncio.wait_for(self._take_stock(), STOCK_S)
            except Exception as error:
                log.warning("Ray does not say what runs: %r", error)
            self.controller.journal = self._journal = reopened(self._journal, self._directory, self.fleet.control.journal_bytes)
            for node in self.machines.suspects - probing:
                probing.add(node)
                self._do(probe(node))

    async def _take_stock(self) -> None:
        at_s = self.clock()
        inventory = await self._hosts.inventory()
        self.machines.told(inventory.nodes)
        self.watch.told_running(inventory.workers, at_s)
        self.actuator.told_running(inventory.workers, at_s)

    def _note(self, snapshot: ClusterSnapshot, decision: Decision, pass_s: float) -> None:
        self._passed = (snapshot, decision)
        told = {change.text for change in self._changes if change.advised}  # Advice is given again each second.
        changes = changes_of(snapshot.pass_number, snapshot.now_s, self.controller.course.mode, decision)
        self._changes.extendleft(change for change in changes if not change.advised or change.text not in told)
        self._metrics.passed(snapshot, decision, pass_s)
        if self.controller.course.text == KEEP_TEXT and self._is_up(snapshot):
            self.controller.course = _course(self.fleet)

    def _is_up(self, snapshot: ClusterSnapshot) -> bool:
        ready = [sum(one.phase is Phase.READY for one in snapshot.replicas_by_group[group.name]) for group in snapshot.groups]
        return all(count >= group.wanted for count, group in zip(ready, snapshot.groups, strict=True))

    def _course(self) -> Course:
        """An adviser brings its fleet up before it only advises."""
        coming_up = self._last is None or self._last.pipeline == KEEP_TEXT
        if self.fleet.control.mode == "advise" and coming_up:
            return Course(pipeline=build(KEEP), text=KEEP_TEXT)
        return _course(self.fleet)

    def _targets(self) -> Any:
        return target_groups(self.fleet, self.registry.table.replicas.values(), self.registry.gateways())

    def _tallies(self) -> Tallies:
        return Tallies(
            failures=self.controller.failures,
            unwritten=self.controller.unwritten,
            telemetry_errors=self.feed.errors,
            samples_refused=self.window.refused,
            loads_refused=self.watch.nonsense,
            heartbeats_lost=self._losses,
            journal_bytes=self._journal.used_bytes,
        )

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _course(fleet: Fleet) -> Course:
    control = fleet.control
    return Course(
        pipeline=build(control.pipeline),
        text=as_text(control.pipeline),
        mode=control.mode,
        challengers={name: build(spec, f"control.challengers.{name}") for name, spec in control.challengers.items()},
    )


def _stale_s(pipeline: Pipeline) -> float:
    """Beyond which telemetry stops being acted upon; never where nobody guards against it."""
    return min((guard.stale_s for guard in pipeline.guards if isinstance(guard, StaleTelemetry)), default=math.inf)


def _start_timeouts(fleet: Fleet) -> dict[str, float]:
    return {group_of(fleet, spec): spec.start_timeout_s for spec in fleet.replicas}
