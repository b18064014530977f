"""Who lives: every worker is listened to over its own stream, and one from which nothing came for SILENCE_S is dead.

That is a matter of bytes alone: what Ray knows of a process's end is used where it is sooner, and waited for nowhere. The workers
of one node that fall silent together are lost together, once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

import msgspec

from cluster.placement import group_name
from cluster.replica import Load, Phase, Replica, Role
from cluster.snapshot import ReplicaState
from controller.observe.assemble import Heard, Started
from controller.observe.machines import Machines
from controller.registry import Registry
from transports.messages import FromWorker, Report

log = logging.getLogger(__name__)

SILENCE_S = 5.0  # Five reports: a worker paused by a busy machine is not taken for dead, and nobody waits long for a dead one.
TOGETHER_S = SILENCE_S / 2  # Silent for so long on a node of which another worker is lost: the node is what was lost.
ENDED_S = 2.0  # Silent for two reports, and not in Ray's list. Whoever was just heard lives, whatever a list says.
MOST_COUNT = 2**53  # No true count of tokens or blocks is above; snapshots and their journal hold 64 bits.
FORGET_LOST_S = 600.0  # A partition that lasts longer is noticed by Ray, which ends the workers behind it.


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that is given up, with what it hosted."""

    worker_id: str
    node: str
    why: str
    replicas: tuple[ReplicaState, ...]


class _Worker(msgspec.Struct):
    node: str
    pid: int
    heard_s: float
    registered_s: float


class Watch:
    """A `transports.links.Listener`."""

    def __init__(self, registry: Registry, machines: Machines, pools: Mapping[str, str], clock: Callable[[], float]) -> None:
        """pools: of each node, by name. clock: Unix seconds that never step back."""
        self._registry = registry
        self._machines = machines
        self.pools = pools
        self.started: dict[str, Started] = {}
        self.heard_loads: dict[str, Heard] = {}
        self.since_s: dict[str, float] = {}
        self._clock = clock
        self._phases: dict[str, tuple[Phase, Role]] = {}
        self._lost: dict[str, ReplicaState] = {}
        self._workers: dict[str, _Worker] = {}
        self.running: frozenset[str] = frozenset()
        self._listed_s = 0.0
        self._swept_s: float | None = None
        self.nonsense = 0
        """Loads that were dropped: of replicas that another worker hosts, or with counts that cannot be."""
        self._refused: set[str] = set()
        """Workers of whose nonsense the log tells."""

    # What comes in

    def heard(self, worker_id: str, message: FromWorker) -> None:
        worker = self._workers.get(worker_id)
        if worker is None or not isinstance(message, Report):
            return
        worker.heard_s = self._clock()
        phases = {}
        for load in message.loads:
            row = self._registry.table.replicas.get(load.replica_id)
            if row is None:  # It has just gone.
                continue
            if row.worker_id != worker_id or not _sane(load):
                self._refuse(worker_id, load)
                continue
            self.heard_loads[load.replica_id] = Heard(load=load, at_s=self._clock())
            phases[load.replica_id] = load.phase
        before = self._registry.table.version
        self._registry.table.phases(worker_id, phases, self._clock())
        if self._registry.table.version != before:
            self._registry.tell()

    def lost(self, worker_id: str, cause: str) -> None:
        """A stream that broke is made again; only silence counts."""

    def busy(self, worker_id: str) -> bool:
        return False

    def table_changed(self) -> None:
        """Whoever registered is taken to have been heard just now."""
        rows = self._registry.table.membership.replicas
        hosting = {row.worker_id: row for row in rows}
        for worker_id, row in hosting.items():
            known = self._workers.get(worker_id)
            if known is None or known.pid != row.pid:
                self._workers[worker_id] = _Worker(row.node, row.pid, self._clock(), self._clock())
        for worker_id in [name for name in self._workers if name not in hosting]:
            del self._workers[worker_id]
        for row in rows:
            state = (row.phase, row.role)
            if self._phases.get(row.replica_id) != state:
                self._phases[row.replica_id] = state
                self.since_s[row.replica_id] = self._clock()
            self.started.pop(row.replica_id, None)
        present = {row.replica_id for row in rows}
        for mine in (self._phases, self.since_s, self.heard_loads):
            for name in [name for name in mine if name not in present]:
                del mine[name]

    def start(self, replica_id: str, group: str, node: str, at_s: float) -> None:
        """It was ordered, and counts as STARTING until it registers."""
        if replica_id not in self._registry.table.replicas:
            self.started[replica_id] = Started(group=group, node=node, at_s=at_s)

    def told_running(self, workers: frozenset[str], at_s: float) -> None:
        """Ray's list of processes, as it was at a time: it knows of an end sooner than silence tells."""
        self.running, self._listed_s = workers, at_s

    def remember_lost(self, states: Iterable[ReplicaState]) -> None:
        """Those that an earlier controller gave up."""
        self._lost.update({state.replica_id: state for state in states})
        self._registry.fenced |= self._lost.keys()

    # What follows

    @property
    def silent(self) -> frozenset[str]:
        """Workers from which nothing came for too long, as of this moment."""
        now_s = self._clock()
        return frozenset(name for name, worker in self._workers.items() if now_s - worker.heard_s > SILENCE_S)

    def sweep(self) -> tuple[Loss, ...]:
        """Give up who is dead."""
        self._excuse_own_delay()
        reasons = {}
        for name, worker in self._workers.items():
            silent_s = self._clock() - worker.heard_s
            if silent_s >= ENDED_S and worker.registered_s < self._listed_s and name not in self.running:
                reasons[name] = "its process has ended"
            elif silent_s > SILENCE_S:
                reasons[name] = f"nothing was heard for {silent_s:.1f} s"
                self._machines.suspect(worker.node)
        nodes = self._machines.suspects | {node for node in self.pools if not self._machines.told_alive(node)}
        for name, worker in self._workers.items():
            if name not in reasons and worker.node in nodes and self._clock() - worker.heard_s > TOGETHER_S:
                reasons[name] = f"node {worker.node} is silent"
        for replica_id, heard in self.heard_loads.items():
            row = self._registry.table.replicas.get(replica_id)
            if row is not None and heard.load.phase is Phase.LOST and row.worker_id not in reasons:
                reasons[row.worker_id] = f"the engine of {replica_id} has ended or hangs"
        losses = tuple(self._give_up(name, reasons[name]) for name in sorted(reasons) if name in self._workers)
        if losses:
            self._registry.tell()
        return losses

    def lost_states(self) -> tuple[ReplicaState, ...]:
        """Given up of late."""
        self._lost = {name: one for name, one in self._lost.items() if self._clock() - one.phase_since_s < FORGET_LOST_S}
        self._registry.fenced &= self._lost.keys()
        return tuple(self._lost.values())

    def give_up_start(self, replica_id: str) -> None:
        """It never registered; should it do so now, it is too late."""
        start = self.started.pop(replica_id, None)
        if start is not None:
            role = Role(start.group.rsplit("/", 2)[1])
            state = ReplicaState(
                replica_id=replica_id,
                group=start.group,
                role=role,
                phase=Phase.LOST,
                node=start.node,
                phase_since_s=round(self._clock(), 3),
            )
            self.remember_lost([state])

    def _refuse(self, worker_id: str, load: Load) -> None:
        self.nonsense += 1
        if worker_id not in self._refused:
            log.warning("%s reports what cannot be, and is not believed: %s", worker_id, load)
            self._refused.add(worker_id)

    def _give_up(self, worker_id: str, why: str) -> Loss:
        worker = self._workers.pop(worker_id)
        self._refused.discard(worker_id)
        states = tuple(self._lost_state(row) for row in self._registry.table.remove_worker(worker_id))
        self.remember_lost(states)
        return Loss(worker_id=worker_id, node=worker.node, why=why, replicas=states)

    def _lost_state(self, row: Replica) -> ReplicaState:
        # By the earlier of two clocks: a worker's own may be ahead of ours.
        ready_s = None if row.ready_since_s is None else min(row.ready_since_s, self.since_s.get(row.replica_id, self._clock()))
        return ReplicaState(
            replica_id=row.replica_id,
            group=group_name(row.model, row.role, self.pools.get(row.node, "")),
            role=row.role,
            phase=Phase.LOST,
            node=row.node,
            phase_since_s=round(self._clock(), 3),
            ready_since_s=ready_s,
        )

    def _excuse_own_delay(self) -> None:
        """Time in which this process itself was held up is not held against anybody."""
        if self._swept_s is not None and (held_up_s := self._clock() - self._swept_s - SILENCE_S / 2) > 0.0:
            for worker in self._workers.values():
                worker.heard_s += held_up_s
        self._swept_s = self._clock()


def _sane(load: Load) -> bool:
    counts = (load.running, load.waiting, load.waiting_tokens, load.kv_tokens, load.kv_blocks_used)
    return all(0 <= count <= MOST_COUNT for count in (load.sequence, *counts))
