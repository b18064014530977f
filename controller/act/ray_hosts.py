"""Workers as named, detached Ray actors: they outlive the controller, and are found again by their names.

Ray's own calls block, some for the time of a round trip to its head: they run on threads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.errors import MobulaError, Unreachable, error_in
from cluster.fleet import Fleet, NodeSpec, ReplicaGroup
from cluster.placement import NODE_LABEL, ReplicaPlan, WorkerPlan, namespace_of
from controller.act.hosts import Inventory
from controller.controller_client import ControllerClient
from workers.worker_process import WorkerProcess

ORDER_S = 10.0  # An order is heard within milliseconds by whoever lives.
PROBE_S = 5.0  # The node starts a process for the answer, which takes a second or two of a busy machine.
WORKER_PREFIX = "worker-"
WORKER_VARIABLE = "MOBULA_WORKER"
"""In the environment of a worker's process: its id."""

# Weights are placed by our own plan, so Ray must neither count cores nor hide the accelerators from an actor that asked for none.
WORKER_ENV = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class RayHosts:
    """Implements `controller.act.hosts.Hosts`."""

    def __init__(self, fleet: Fleet, secret: str, epoch: int) -> None:
        self._namespace = namespace_of(fleet.name)
        self._transport = fleet.transport
        self._secret = secret
        self._epoch = epoch
        self._handles: dict[str, Any] = {}

    async def start(self, worker_id: str, node: NodeSpec, plan: ReplicaPlan) -> None:
        """Waits for the worker's process, however long that takes to begin; what then happens in it, the worker tells."""
        for known in (worker_id in self._handles, False):
            handle = await asyncio.to_thread(self._made, worker_id, node, plan)
            try:
                await handle.host.remote(plan, self._epoch)
                return
            except RayTaskError as error:
                raise _cause(error) from error
            except RayActorError as error:
                self._handles.pop(worker_id, None)
                if not known:  # Else it was another, that has ended since.
                    raise _death(f"{worker_id} on node {node.name}", error) from error

    async def drain(self, worker_id: str, replica_id: str, within_s: float) -> None:
        await self._order(worker_id, lambda handle: handle.drain_replica.remote(replica_id, within_s, self._epoch))

    async def change_role(self, worker_id: str, replica_id: str, group: ReplicaGroup, within_s: float) -> None:
        await self._order(worker_id, lambda handle: handle.change_role.remote(replica_id, group, within_s, self._epoch))

    async def slow(self, worker_id: str, replica_id: str, factor: float) -> None:
        await self._order(worker_id, lambda handle: handle.slow.remote(replica_id, factor))

    async def end(self, worker_id: str, node: str) -> None:
        """Ray ends a process that listens; one that does not is killed by another on its node."""
        handle = self._handles.pop(worker_id, None)
        with contextlib.suppress(ValueError, RayError):
            handle = handle or await asyncio.to_thread(ray.get_actor, worker_id, self._namespace)
            await asyncio.to_thread(ray.kill, handle, no_restart=True)
        if node:
            with contextlib.suppress(TimeoutError, RayError):
                await self._on_node(ORDER_S, node, _kill, worker_id)

    async def probe(self, node: str) -> bool:
        try:
            await self._on_node(PROBE_S, node, _here)
        except (TimeoutError, RayError):
            return False
        return True

    async def inventory(self) -> Inventory:
        known = set(self._handles)
        nodes = await asyncio.to_thread(ray.nodes)
        actors = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        names = (actor["name"] for actor in actors if actor["namespace"] == self._namespace)
        workers = frozenset(name for name in names if name.startswith(WORKER_PREFIX))
        for name in known - workers:  # They have ended by themselves.
            self._handles.pop(name, None)
        return Inventory(
            nodes=frozenset(node["Labels"][NODE_LABEL] for node in nodes if node["Alive"] and NODE_LABEL in node["Labels"]),
            workers=workers,
        )

    def _made(self, worker_id: str, node: NodeSpec, plan: ReplicaPlan) -> Any:
        """By its name there is one at most, whoever made it."""
        if worker_id not in self._handles:
            actor = ray.remote(WorkerProcess).options(
                name=worker_id,
                namespace=self._namespace,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_restarts=0,
                max_task_retries=0,
                label_selector={NODE_LABEL: node.name},
                runtime_env={"env_vars": {**WORKER_ENV, WORKER_VARIABLE: worker_id}},
            )
            made = WorkerPlan(worker_id=worker_id, node=node, replicas=(plan,))
            self._handles[worker_id] = actor.remote(
                made, self._transport, self._secret, ControllerClient(self._namespace), self._epoch
            )
        return self._handles[worker_id]

    async def _order(self, worker_id: str, order: Callable[[Any], Awaitable[None]]) -> None:
        try:
            handle = self._handles.get(worker_id) or await asyncio.to_thread(ray.get_actor, worker_id, self._namespace)
            self._handles[worker_id] = handle
            await asyncio.wait_for(order(handle), ORDER_S)
        except RayTaskError as error:
            raise _cause(error) from error
        except TimeoutError:
            raise Unreachable(f"{worker_id} did not answer within {ORDER_S:.0f} s") from None
        except (ValueError, RayError) as error:
            self._handles.pop(worker_id, None)
            raise Unreachable(f"{worker_id} is gone") from error

    async def _on_node(self, bound_s: float, node: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """In a process of its own on that node. Raises TimeoutError."""
        there = ray.remote(call).options(num_cpus=0, max_retries=0, label_selector={NODE_LABEL: node})
        answer = there.remote(*arguments)
        try:
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(answer.future())), bound_s)
        except TimeoutError:
            ray.cancel(answer)  # Else it waits for its node for ever.
            raise


def _here() -> None:
    """That it is run is the answer."""


def _kill(worker_id: str) -> None:
    """On this node: the process that was started as this worker."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(WORKER_VARIABLE) == worker_id:
                process.kill()


def _cause(error: RayTaskError) -> MobulaError:
    """The worker's own error, without Ray's traceback around it."""
    cause = error.cause
    return cause if isinstance(cause, MobulaError) else Unreachable(f"{type(cause).__name__}: {cause}")


def _death(place: str, error: RayActorError) -> MobulaError:
    report = str(error).strip()
    told = error_in(report)
    if told is not None:
        told.args = (f"{place}: {told}",)
        return told
    return Unreachable(f"{place} died while it started: {report.splitlines()[-1]}")
