"""Bringing up a fleet's controller as a Ray actor, and ending it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.errors import InvalidConfig, Unreachable, error_in
from cluster.fleet import Fleet
from cluster.placement import CONTROLLER_NAME, NODE_LABEL, namespace_of
from controller.config import memory_by_node
from controller.controller_client import ControllerClient
from controller.controller_process import ControllerProcess
from controller.directory import put_journal_aside, write_fleet

START_S = 60.0
RETRY_S = 0.5
STOP_S = 20.0  # Beyond draining: engines' last steps and the streams' grace.


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


async def start_controller(fleet: Fleet, directory: Path, secret: str, prometheus_url: str | None = None) -> ControllerClient:
    """The fleet's controller, on this node, where its directory is; an earlier one's journal there is put aside.

    Ray starts it again whenever it dies. Raises what keeps it from running.
    """
    put_journal_aside(directory)
    write_fleet(directory, fleet)
    here = ray.get_runtime_context().get_node_id()
    actor = ray.remote(ControllerProcess).options(
        name=CONTROLLER_NAME,
        namespace=namespace_of(fleet.name),
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
    )
    try:
        handle = actor.remote(str(directory), secret, prometheus_url)
    except ValueError as error:
        raise InvalidConfig(f"a fleet named {fleet.name} runs in this Ray already: {error}") from error
    try:
        async with asyncio.timeout(START_S):
            await handle.progress.remote()
    except TimeoutError:
        raise Unreachable(f"the controller did not answer within {START_S:.0f} s") from None
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from None
    except RayActorError as error:
        report = str(error).strip()
        raise error_in(report) or Unreachable(f"the controller died while it started: {report.splitlines()[-1]}") from error
    return ControllerClient(namespace_of(fleet.name))


async def stop_controller(fleet_name: str, drain_s: float) -> None:
    """End every worker of the fleet, in order within the bound, and then its controller. Harmless without any.

    Raises Unreachable where that was not in order; all have ended all the same.
    """
    last: Exception | None = None
    try:
        async with asyncio.timeout(drain_s + STOP_S):
            while (handle := await asyncio.to_thread(_controller, fleet_name)) is not None:
                try:
                    await handle.shutdown.remote(drain_s)
                    break
                except RayError as error:  # It has died, and Ray begins it anew.
                    last = error
                    await asyncio.sleep(RETRY_S)
    except TimeoutError:
        raise Unreachable(
            f"the controller of {fleet_name} did not end its workers in order: {last or 'it takes too long'}"
        ) from None
    finally:
        await asyncio.to_thread(_end_all, namespace_of(fleet_name))


def _controller(fleet_name: str) -> Any:
    try:
        return ray.get_actor(CONTROLLER_NAME, namespace_of(fleet_name))
    except ValueError:
        return None


def _end_all(namespace: str) -> None:
    """The controller first, so that nobody replaces what ends."""
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == namespace]
    for name in sorted(names, key=lambda name: name != CONTROLLER_NAME):
        with contextlib.suppress(ValueError, RayError):
            ray.kill(ray.get_actor(name, namespace), no_restart=True)
