"""Starting and stopping workers as Ray actors, all or none."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.errors import InvalidConfig, MobulaError, Unreachable, error_in
from cluster.fleet import Fleet
from cluster.placement import CONTROLLER_NAME, NODE_LABEL, WorkerPlan, namespace_of
from controller.config import memory_by_node
from controller.registry import Registry, RegistryClient
from workers.worker import DRAIN_S
from workers.worker_process import WorkerProcess

START_S = 900.0  # A big checkpoint from a slow disk, or from the hub.
REGISTRY_START_S = 60.0
STOP_S = 20.0  # Beyond draining: an engine's last step and the streams' grace.

# Weights are placed by our own plan, so Ray must neither count cores nor hide the accelerators from an actor that asked for none.
WORKER_ENV = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def check_nodes(fleet: Fleet) -> None:
    """Raise InvalidConfig for the first node that no live Ray node is labelled as, or whose memory its replicas exceed."""
    memory = {node["Labels"].get(NODE_LABEL): node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]}
    taken = memory_by_node(fleet)
    for node in fleet.nodes:
        if node.name not in memory:
            raise InvalidConfig(f"nodes: no Ray node carries the label {NODE_LABEL}={node.name}; `ray start --labels` gives it")
        if taken[node.name] > memory[node.name]:
            raise InvalidConfig(
                f"nodes: {node.name}: its replicas' weights and KV are {taken[node.name]} bytes, "
                f"above {memory[node.name]:.0f}, the memory that its Ray node has"
            )


async def start_registry(fleet: Fleet) -> RegistryClient:
    """The fleet's registry, named for gateways to find. It lives as long as the process that calls this."""
    options = {"name": CONTROLLER_NAME, "namespace": namespace_of(fleet.name), "num_cpus": 0, "max_restarts": 0}
    handle = ray.remote(Registry).options(**options).remote()
    async with asyncio.timeout(REGISTRY_START_S):
        await handle.start.remote()
    return RegistryClient(handle)


class Workers:
    """The started workers, by worker id."""

    def __init__(self, fleet: Fleet, secret: str, registry: RegistryClient) -> None:
        self._fleet = fleet
        self._secret = secret
        self._registry = registry
        self._handles: dict[str, Any] = {}

    async def start(self, plans: Sequence[WorkerPlan], ready: Callable[[WorkerPlan], None], bound_s: float = START_S) -> None:
        """Start all and wait until the last is ready, saying each. If one fails, all end and its error is raised."""
        try:
            async with asyncio.timeout(bound_s), asyncio.TaskGroup() as starting:
                for plan in plans:
                    starting.create_task(self._start(plan, ready))
        except TimeoutError:
            await self.stop(drain_s=0.0)
            raise Unreachable(f"workers: not all of {len(plans)} were ready within {bound_s:.0f} s") from None
        except BaseExceptionGroup as group:
            await self.stop(drain_s=0.0)
            raise _first(group) from None
        except BaseException:
            await self.stop(drain_s=0.0)
            raise

    async def stop(self, drain_s: float = DRAIN_S) -> None:
        """Drain, stop and end every worker. One that does not answer is ended all the same."""
        await asyncio.gather(*(self._stop(handle, drain_s) for handle in self._handles.values()))
        self._handles.clear()

    async def call(self, worker_id: str, method: str, timeout_s: float) -> Any:
        """A method of one worker. Raises Unreachable where it is gone, TimeoutError where it is busy."""
        try:
            async with asyncio.timeout(timeout_s):
                return await getattr(self._handles[worker_id], method).remote()
        except RayActorError as error:
            raise Unreachable(f"{worker_id} is gone") from error

    async def _start(self, plan: WorkerPlan, ready: Callable[[WorkerPlan], None]) -> None:
        actor = ray.remote(WorkerProcess).options(
            name=plan.worker_id,
            namespace=namespace_of(self._fleet.name),
            num_cpus=0,
            max_restarts=0,
            max_task_retries=0,
            label_selector={NODE_LABEL: plan.node.name},
            runtime_env={"env_vars": WORKER_ENV},
        )
        handle = self._handles[plan.worker_id] = actor.remote(plan, self._fleet.transport, self._secret, self._registry)
        try:
            await handle.start.remote()
        except RayTaskError as error:
            raise _cause(error, plan) from error
        except RayActorError as error:
            place, report = f"{plan.worker_id} on node {plan.node.name}", str(error).strip()
            if (told := error_in(report)) is not None:
                raise _at(place, told) from error
            raise Unreachable(f"{place} died while it started: {report.splitlines()[-1]}") from error
        ready(plan)

    async def _stop(self, handle: Any, drain_s: float) -> None:
        with contextlib.suppress(RayActorError, RayTaskError, TimeoutError):
            async with asyncio.timeout(drain_s + STOP_S):
                if drain_s > 0:
                    await handle.drain.remote(drain_s)
                await handle.stop.remote()
        ray.kill(handle, no_restart=True)


def _cause(error: RayTaskError, plan: WorkerPlan) -> MobulaError:
    """The worker's own error, without Ray's traceback around it, and with the replicas it was about."""
    cause = error.cause
    if not isinstance(cause, MobulaError):
        return Unreachable(f"{_names(plan)}: {type(cause).__name__}: {cause}")
    return _at(_names(plan), cause)


def _at(place: str, error: MobulaError) -> MobulaError:
    error.args = (f"{place}: {error}",)
    return error


def _names(plan: WorkerPlan) -> str:
    names: Iterable[str] = (replica.replica_id for replica in plan.replicas)
    return ", ".join(list(names)[:3]) + (" ..." if len(plan.replicas) > 3 else "")


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
