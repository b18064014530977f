"""The simulated cluster as a controller sees it: `observe` gives the snapshot that live telemetry would, `apply` takes actions.

Snapshots are assembled by the live code from what has been heard by then: load reports that were on their way for a while, counters
that are older, replicas that are dead and not missed yet.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec
import numpy as np

from cluster.actions import Action, ChangeRole, DrainReplica, StartReplica
from cluster.fleet import Fleet
from cluster.metrics import DEMAND_NAMES, Sample
from cluster.placement import group_name, group_of, slots_of
from cluster.replica import Load, Phase, Replica, Role
from cluster.snapshot import ClusterSnapshot, ReplicaState
from controller.act.actuator import ROLE_DRAIN_S
from controller.act.orders import Order, Orders, Settled
from controller.memory import Memory
from controller.observe.assemble import SPAN_S, Heard, Seen, Started, assemble
from controller.observe.watch import FORGET_LOST_S, SILENCE_S
from controller.observe.window import Window
from simulator.engines import Engines
from simulator.gateway import SimulatedGateway
from simulator.host import Host
from simulator.machines import Machine
from simulator.serving import Serving
from simulator.steps.engines import BLOCKS_USED, DECODE_STEP_S, KV_TOKENS, LATEST_STEP_S, POWER_W, RUNNING, WAITING_TOKENS, WAITS
from simulator.timeline import Timeline, stream
from simulator.world import World

REPORT_PHASES = 5  # Replicas report in turn: not all in one instant.
RAY_LAG_S = 15.0  # Until Ray's list lacks a node that died (`controller.act.hosts.Inventory`).
TRUSTED_S = 10.0  # Until a node that is back is used again: see `controller.observe.machines`.
SETTLED_S = 600.0  # Replicas that are there at the beginning have been READY for so long.


class SimulatedCluster:
    """Nodes, replicas, and what is known of them."""

    def __init__(
        self,
        fleet: Fleet,
        world: World,
        machines: Mapping[str, Machine],
        timeline: Timeline,
        engines: Engines,
        serving: Serving,
        hosts: dict[str, Host],
        *,
        seed: int,
        note: Callable[[str, str], None],
    ) -> None:
        """hosts: by replica id; kept here. note: told of events, their kind and what happened."""
        self.fleet, self.hosts = fleet, hosts
        self.gateways: tuple[SimulatedGateway, ...] = ()
        self.orders = Orders({group_of(fleet, spec): spec.start_timeout_s for spec in fleet.replicas})
        self.dead_nodes: set[str] = set()
        self._told_dead: set[str] = set()
        """Nodes of which the controller has heard that they are down."""
        self.deaf = False
        """Whether telemetry is lost just now."""
        self.started: dict[str, Started] = {}
        self._world, self._machines, self._timeline, self._engines, self._serving = world, machines, timeline, engines, serving
        self._note = note
        self._models = {name: engines.model(one.true) for name, one in machines.items()}
        self._pools = {node.name: node.pool for node in fleet.nodes}
        self._speeds, self._starts, self._losses = (stream(seed, name) for name in ("speeds", "starts", "report losses"))
        self._lost: dict[str, ReplicaState] = {}
        self._window = Window(SPAN_S)
        self._counters: deque[tuple[float, list[Sample]]] = deque()
        self._table: tuple[Replica, ...] = ()
        self.gone: list[Host] = []
        """Replicas that were, for the accounts."""
        serving.idle = self._idle
        self._numbers = itertools.count()
        for spec in fleet.replicas:
            self._place(group_of(fleet, spec), spec.pool, spec.count)
        self.next_replica = next(self._numbers)

    # ── what a controller sees and does ──

    def observe(self, memory: Memory) -> ClusterSnapshot:
        """The cluster as far as is known now."""
        now_s = self._timeline.now_s
        while self._counters and self._counters[0][0] + self._world.counters_delay_s <= now_s:
            self._window.add(*self._counters.popleft())
        self._lost = {name: one for name, one in self._lost.items() if now_s - one.phase_since_s < FORGET_LOST_S}
        seen = Seen(
            replicas=self._table,
            started=self.started,
            lost=tuple(self._lost.values()),
            heard={row.replica_id: heard for row in self._table if (heard := self._heard(row.replica_id)) is not None},
            since_s={row.replica_id: self.hosts[row.replica_id].since_s for row in self._table},
            alive=frozenset(self._pools.keys() - self._told_dead),
            draining=self.orders.draining,
            changing=self.orders.changing,
        )
        return assemble(self.fleet, seen, self._window.found(DEMAND_NAMES, now_s), memory, now_s)

    def apply(self, number: int, actions: Sequence[Action]) -> None:
        """Begin what a pass has decided."""
        for order in self.orders.begin(number, actions, self._timeline.now_s):
            self._carry_out(order)

    def settle(self, snapshot: ClusterSnapshot, memory: Memory) -> Settled:
        """What has become of what was begun before."""
        settled = self.orders.settle(snapshot, memory)
        for replica_id in settled.overdue:
            self.started.pop(replica_id, None)
            if (host := self.hosts.get(replica_id)) is not None and host.alive:
                self.kill(host, 0.0)
        return settled

    def count(self) -> None:
        """Gateways send their counters to the controller, once a second."""
        if not self.deaf:
            samples = [one for gateway in self.gateways for each in gateway.counters.values() for one in each.samples()]
            self._counters.append((self._timeline.now_s, samples))

    def _heard(self, replica_id: str) -> Heard | None:
        host = self.hosts[replica_id]
        return None if host.load is None else Heard(load=host.load, at_s=host.heard_s)

    def _carry_out(self, order: Order) -> None:
        action, now_s = order.action, self._timeline.now_s
        order.begun = True
        host = self.hosts.get(action.replica_id)
        match action:
            case StartReplica():
                self._start(action)
            case DrainReplica():
                if host is None:
                    self.started.pop(action.replica_id, None)
                elif host.alive:
                    self._drain(host, action.deadline_s)
            case ChangeRole():
                if host is not None and host.alive:
                    host.next_role = action.role
                    host.enter(Phase.WARMING, now_s)
                    self._tell_members()
                    self._timeline.after(ROLE_DRAIN_S, partial(self._hurry, host, host.since_s))
                    self._idle_unless_busy(host)

    # ── replicas ──

    def _place(self, group: str, pool: str, count: int) -> None:
        """Those that the config starts with, on the pool's nodes in turn."""
        room = {node.name: slots_of(self.fleet, node) for node in self.fleet.nodes if node.pool == pool}
        for host in self.hosts.values():
            if host.row.node in room:
                room[host.row.node] -= 1
        for _ in range(count):
            node = max(room, key=lambda name: room[name])
            room[node] -= 1
            name = f"{self._machines[group].spec.role.value}-{pool}-{next(self._numbers)}"
            self._serve(name, group, node, self._timeline.now_s - SETTLED_S)

    def _start(self, action: StartReplica) -> None:
        now_s, spec = self._timeline.now_s, self._machines[action.group].spec
        self.started[action.replica_id] = Started(group=action.group, node=action.node, at_s=now_s)
        if action.node in self.dead_nodes or self._starts.random() < self._world.start_failure_share:
            return
        took_s = spec.startup_s * self._starts.lognormvariate(0.0, self._world.startup_sd)
        self._timeline.after(took_s, partial(self._registers, action))

    def _registers(self, action: StartReplica) -> None:
        if self.started.get(action.replica_id) is not None and action.node not in self.dead_nodes:
            del self.started[action.replica_id]
            self._serve(action.replica_id, action.group, action.node, self._timeline.now_s)
            self._tell_members()
            self._note("ready", action.replica_id)

    def _serve(self, name: str, group: str, node: str, since_s: float) -> None:
        machine = self._machines[group]
        spec, world = machine.spec, self._world
        slowness = self._speeds.lognormvariate(0.0, world.replica_speed_sd)
        engine = self._engines.add(
            model=self._models[group],
            kv_blocks=spec.kv_blocks,
            block_tokens=spec.block_tokens,
            max_running=spec.max_running,
            step_budget_tokens=spec.step_budget_tokens,
            slowness=slowness,
        )
        row = Replica(
            replica_id=name,
            worker_id=name,
            node=node,
            endpoint="",
            role=spec.role,
            phase=Phase.READY,
            model=spec.model or self.fleet.models[0].name,
            engine=spec.engine,
            host_id=node,
            performance=machine.believed,
            layout=machine.layout,
            kv_blocks=spec.kv_blocks,
            block_tokens=spec.block_tokens,
            context_tokens=machine.context_tokens,
            max_running=min(spec.max_running, spec.step_budget_tokens),
            step_budget_tokens=spec.step_budget_tokens,
            ready_since_s=since_s,
        )
        host = self.hosts[name] = Host(row, spec, engine, since_s)
        host.idle_w, host.slowness = machine.true.idle_w, slowness
        host.born_s = max(since_s, 0.0)
        self._serving.on_engine[engine] = host
        self._serving.links.inside(node, machine.node_bytes_per_s)
        self._break_some_time(host)

    def _drain(self, host: Host, deadline_s: float) -> None:
        if host.row.phase is Phase.DRAINING:
            return
        host.next_role = None
        host.enter(Phase.DRAINING, self._timeline.now_s)
        self._tell_members()
        if math.isfinite(deadline_s):
            self._timeline.at(max(deadline_s, self._timeline.now_s), partial(self._hurry, host, host.since_s))
        self._idle_unless_busy(host)

    def _hurry(self, host: Host, since_s: float) -> None:
        """The time is over of the phase that it entered then: what it still has is resumed elsewhere."""
        if host.alive and host.since_s == since_s and self.hosts.get(host.replica_id) is host:
            self._serving.move_off(host)
            for flight in list(host.sources):
                self._serving.compute_where_decoded(flight)
            self._idle_unless_busy(host)

    def _idle_unless_busy(self, host: Host) -> None:
        if not host.busy:
            self._idle(host)

    def _idle(self, host: Host) -> None:
        """A replica that takes nothing new has nothing left: at the next instant it stops, or changes its role."""
        self._timeline.after(0.0, partial(self._stop_or_change, host))

    def _stop_or_change(self, host: Host) -> None:
        if host.busy or not host.alive or self.hosts.get(host.replica_id) is not host:
            return
        if host.row.phase is Phase.DRAINING:
            self._remove(host)
            self._tell_members()
        elif host.row.phase is Phase.WARMING and host.next_role is not None:
            self._timeline.after(self._world.role_change_s, partial(self._change, host, host.next_role))
            host.next_role = None

    def _change(self, host: Host, role: Role) -> None:
        if host.alive and host.row.phase is Phase.WARMING:
            spec = self._machines[group_name(host.row.model, role, self._pools[host.row.node])].spec
            host.row = msgspec.structs.replace(host.row, role=role)
            host.spec = spec
            host.enter(Phase.READY, self._timeline.now_s)
            self._tell_members()
            self._note("role", f"{host.replica_id} is {role.value}")

    def _remove(self, host: Host) -> None:
        if host.alive:
            self._serving.close(host)
        del self.hosts[host.replica_id]
        self.gone.append(host)

    def kill(self, host: Host, noticed_s: float) -> None:
        """Its process ends or hangs: gateways notice after so long, the controller after its silence."""
        if not host.alive:
            return
        self._serving.lose(host, noticed_s)
        self._timeline.after(max(SILENCE_S, noticed_s), partial(self._missed, host))

    def _missed(self, host: Host) -> None:
        if self.hosts.get(host.replica_id) is not host:
            return
        now_s, row = self._timeline.now_s, host.row
        self._lost[row.replica_id] = ReplicaState(
            replica_id=row.replica_id,
            group=group_name(row.model, row.role, self._pools[row.node]),
            role=row.role,
            phase=Phase.LOST,
            node=row.node,
            phase_since_s=round(now_s, 3),
            ready_since_s=row.ready_since_s,
        )
        self._remove(host)
        self._tell_members()

    def lose_node(self, node: str) -> None:
        """A machine is gone, with all on it. Nobody is told: silence tells, or Ray, which lags."""
        self.dead_nodes.add(node)
        hosts = [host for host in self.hosts.values() if host.row.node == node]
        for host in hosts:
            self.kill(host, self.fleet.gateway.silence_s)
        self._timeline.after(SILENCE_S if hosts else RAY_LAG_S, partial(self._tell_node, node))

    def regain_node(self, node: str) -> None:
        self.dead_nodes.discard(node)
        self._timeline.after(TRUSTED_S, partial(self._tell_node, node))

    def _tell_node(self, node: str) -> None:
        """The controller hears how it is by now."""
        (self._told_dead.add if node in self.dead_nodes else self._told_dead.discard)(node)

    def slow(self, host: Host, factor: float) -> None:
        """Every step lasts `factor` times as long as it did at first, from the next one on."""
        if host.alive:
            self._engines.slow(host.engine, host.slowness * factor, self._timeline.now_s)

    def _break_some_time(self, host: Host) -> None:
        if self._world.replica_mtbf_s is not None:
            self._timeline.after(self._starts.expovariate(1.0 / self._world.replica_mtbf_s), partial(self._break, host))

    def _break(self, host: Host) -> None:
        if host.alive and self.hosts.get(host.replica_id) is host:
            self._note("kill", f"{host.replica_id} fails")
            self.kill(host, self._world.hop_s)

    # ── news ──

    def _tell_members(self) -> None:
        """The table changes for all at once: it is pushed, and small."""
        self._table = tuple(self.hosts[name].row for name in sorted(self.hosts))
        for gateway in self.gateways:
            gateway.adopt(self._table, self._timeline.now_s)
            gateway.pump(self._timeline.now_s)

    def begin(self, gateways: tuple[SimulatedGateway, ...]) -> None:
        """Everything is in place: replicas begin to report."""
        self.gateways = gateways
        self._tell_members()
        for phase in range(REPORT_PHASES):
            self._timeline.after(self._world.report_every_s * (phase + 1) / REPORT_PHASES, partial(self._report, phase))

    def _report(self, phase: int) -> None:
        """A fifth of the replicas say how they are."""
        now_s, chance = self._timeline.now_s, self._losses
        self._timeline.after(self._world.report_every_s, partial(self._report, phase))
        hosts = [host for host in self.hosts.values() if host.alive and host.engine % REPORT_PHASES == phase]
        if self.deaf:
            return
        if self._world.report_loss_share:
            hosts = [host for host in hosts if chance.random() >= self._world.report_loss_share]
        if not hosts:
            return
        rows = self._engines.loads(np.array([host.engine for host in hosts], np.int32), now_s).tolist()
        loads = [(host, self._load(host, row, now_s)) for host, row in zip(hosts, rows, strict=True)]
        if self._world.report_delay_s > 0.0:
            self._timeline.after(self._world.report_delay_s, partial(self._heed, loads))
        else:
            self._heed(loads)

    def _load(self, host: Host, row: Sequence[float], now_s: float) -> Load:
        host.reports += 1
        return Load(
            replica_id=host.replica_id,
            sequence=host.reports,
            at_s=now_s,
            phase=host.row.phase,
            running=int(row[RUNNING]),
            waiting=int(row[WAITS]),
            waiting_tokens=int(row[WAITING_TOKENS]),
            kv_tokens=int(row[KV_TOKENS]),
            kv_blocks_used=int(row[BLOCKS_USED]),
            step_s=row[LATEST_STEP_S],
            power_w=row[POWER_W],
            slowdown=_slowdown(host.row, row),
        )

    def _heed(self, loads: Sequence[tuple[Host, Load]]) -> None:
        now_s = self._timeline.now_s
        for host, load in loads:
            if host.missed:  # Its stream is broken, and what was on it lost.
                continue
            host.load, host.heard_s = load, now_s
            for gateway in self.gateways:
                gateway.report(load, now_s)
        for gateway in self.gateways:
            if gateway.waiting:
                gateway.pump(now_s)


def _slowdown(row: Replica, load: Sequence[float]) -> float:
    """True over believed time of a decode step of this batch; 1 where nothing decodes."""
    if not load[RUNNING]:
        return 1.0
    return load[DECODE_STEP_S] / row.performance.decode_step_s(int(load[RUNNING]), int(load[KV_TOKENS]))
