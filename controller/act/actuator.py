"""Carries decisions out: each action is one order to one worker, and what becomes of it is seen in later snapshots."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from cluster.actions import Action, ChangeRole, DrainReplica, StartReplica
from cluster.errors import MobulaError
from cluster.fleet import Fleet, ReplicaGroup
from cluster.placement import ReplicaPlan, group_of
from cluster.snapshot import ClusterSnapshot
from controller.act.hosts import Hosts
from controller.act.orders import Order, Orders, Settled
from controller.config import model_of
from controller.memory import Memory
from controller.observe.watch import Loss, Watch
from controller.registry import Registry

log = logging.getLogger(__name__)

LISTS = 2  # Of Ray's, in a row, that lack a process: one alone may be wrong.
ROLE_DRAIN_S = 60.0  # What a replica has in its old role may take so long; the rest is resumed elsewhere.


class Actuator:
    """Implements `controller.controller.Actuator`."""

    def __init__(
        self, fleet: Fleet, hosts: Hosts, orders: Orders, registry: Registry, watch: Watch, clock: Callable[[], float]
    ) -> None:
        self.fleet = fleet
        self._hosts, self._orders, self._registry, self._watch, self._clock = hosts, orders, registry, watch, clock
        self._tasks: set[asyncio.Task[None]] = set()

    def apply(self, number: int, actions: Sequence[Action]) -> None:
        self.carry_out(self._orders.begin(number, actions, self._clock()))

    def carry_out(self, orders: Iterable[Order]) -> None:
        """Those that an earlier controller began, too: it may not have come to giving them."""
        for order in orders:
            if isinstance(order.action, StartReplica):
                self._watch.start(order.action.replica_id, order.action.group, order.action.node, order.at_s)
            self._do(self._carry_out(order))

    def settle(self, snapshot: ClusterSnapshot, memory: Memory) -> Settled:
        settled = self._orders.settle(snapshot, memory)
        nodes = {state.replica_id: state.node for state in snapshot.replicas}
        for replica_id in settled.overdue:
            self.end(replica_id, nodes.get(replica_id, ""))
        return settled

    def bury(self, loss: Loss) -> None:
        """A worker that is taken for dead does not go on in secret."""
        log.warning("%s on %s is lost with %d replicas: %s", loss.worker_id, loss.node, len(loss.replicas), loss.why)
        self._do(self._hosts.end(loss.worker_id, loss.node))

    def told_running(self, workers: frozenset[str], at_s: float) -> None:
        """Ray's list of processes at a time. A start whose process has ended is told by nobody else."""
        for replica_id, order in self._orders.open.items():
            starting = isinstance(order.action, StartReplica) and self.worker_of(replica_id) is None
            gone = starting and order.begun and order.at_s < at_s and self._worker_of_start(replica_id) not in workers
            order.unlisted = order.unlisted + 1 if gone else 0
            if order.unlisted == LISTS:
                self._orders.fail(replica_id, "its process ended while it started")

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _carry_out(self, order: Order) -> None:
        try:
            await self._order(order.action)
            order.begun = True
        except MobulaError as error:
            self._orders.fail(order.action.replica_id, str(error))
        except Exception as error:
            log.exception("%s", order.action)
            self._orders.fail(order.action.replica_id, f"{type(error).__name__}: {error}")

    async def _order(self, action: StartReplica | DrainReplica | ChangeRole) -> None:
        worker_id = self.worker_of(action.replica_id)
        match action:
            case StartReplica():
                group = self._group(action.group)
                node = next(node for node in self.fleet.nodes if node.name == action.node)
                plan = ReplicaPlan(replica_id=action.replica_id, group=group, model=model_of(self.fleet, group))
                await self._hosts.start(worker_id or self._worker_for(action.replica_id, group, action.node), node, plan)
            case DrainReplica():
                within_s = max(0.0, action.deadline_s - self._clock())
                if worker_id is not None:
                    await self._hosts.drain(worker_id, action.replica_id, within_s)
                else:
                    await self._call_off(action.replica_id)
            case ChangeRole():
                await self._hosts.change_role(
                    worker_id or f"worker-{action.replica_id}", action.replica_id, self._group(action.target), ROLE_DRAIN_S
                )

    async def _call_off(self, replica_id: str) -> None:
        """A start that is under way. One that cannot be told comes too late, should it come."""
        try:
            await self._hosts.drain(self._worker_of_start(replica_id), replica_id, 0.0)
            self._watch.started.pop(replica_id, None)
        except MobulaError:
            self._watch.give_up_start(replica_id)

    def worker_of(self, replica_id: str) -> str | None:
        """As it registered; None before that."""
        row = self._registry.table.replicas.get(replica_id)
        return None if row is None else row.worker_id

    def _worker_for(self, replica_id: str, group: ReplicaGroup, node: str) -> str:
        """A process of its own; where several share one, the same for the same replica, whoever asks."""
        if group.per_worker == 1:
            return f"worker-{replica_id}"
        nodes = sum(other.pool == group.pool for other in self.fleet.nodes)
        share = int(replica_id.rpartition("-")[2]) // (group.per_worker * nodes)
        return f"worker-{group.role.value}-{node}-{share}"

    def _worker_of_start(self, replica_id: str) -> str:
        """Of one that has not registered yet."""
        start = self._watch.started.get(replica_id)
        return f"worker-{replica_id}" if start is None else self._worker_for(replica_id, self._group(start.group), start.node)

    def end(self, replica_id: str, node: str) -> None:
        """By force, and only where nobody else lives in its process."""
        worker_id = self.worker_of(replica_id) or self._worker_of_start(replica_id)
        others = {name for name in self._watch.started if self._worker_of_start(name) == worker_id}
        if (others | self._registry.table.hosted(worker_id)) - {replica_id}:
            self._do(self._call_off(replica_id))
        else:
            self._watch.give_up_start(replica_id)
            self._do(self._hosts.end(worker_id, node))

    def _group(self, name: str) -> ReplicaGroup:
        return next(spec for spec in self.fleet.replicas if group_of(self.fleet, spec) == name)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
