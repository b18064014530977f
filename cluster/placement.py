"""Where a fleet's replicas go: each named replica, and the worker process that hosts it."""

from __future__ import annotations

import math

import msgspec

from cluster.fleet import Fleet, ModelSpec, NodeSpec, ReplicaGroup
from cluster.replica import Role

NODE_LABEL = "mobula-node"
"""The label by which a Ray node is known as one of the fleet's; its value is the node's name."""

CONTROLLER_NAME = "mobula-controller"
"""The controller's actor, in the fleet's namespace. It keeps the membership table, too."""


def group_name(model: str, role: Role, pool: str) -> str:
    """Of the replicas that are scaled as one, as claims, reasons and operators call it."""
    return f"{model}/{role.value}/{pool}"


def group_of(fleet: Fleet, spec: ReplicaGroup) -> str:
    """The group's name. Its model is the one it names, or the only one."""
    return group_name(spec.model or fleet.models[0].name, spec.role, spec.pool)


def limits_of(spec: ReplicaGroup) -> tuple[int, int]:
    """Least and most replicas that a group may ever have."""
    low, high = spec.min_replicas, spec.max_replicas
    return spec.count if low is None else low, spec.count if high is None else high


def limits_at(spec: ReplicaGroup, now_s: float) -> tuple[int, int]:
    """Least and most at a Unix time, schedules included. Where two that overlap leave no number, the later one's limit holds."""
    low, high = limits_of(spec)
    for schedule in spec.schedules:
        if schedule.covers(now_s):
            if schedule.min_replicas is not None:
                low, high = schedule.min_replicas, max(high, schedule.min_replicas)
            if schedule.max_replicas is not None:
                low, high = min(low, schedule.max_replicas), schedule.max_replicas
    return low, high


def slots_of(fleet: Fleet, node: NodeSpec) -> int:
    """Replicas that the node can host: as said, or its even share of the most that its pool may have."""
    if node.slots is not None:
        return node.slots
    most = sum(limits_of(spec)[1] for spec in fleet.replicas if spec.pool == node.pool)
    return math.ceil(most / sum(other.pool == node.pool for other in fleet.nodes))


def namespace_of(fleet_name: str) -> str:
    """The Ray namespace in which a fleet's actors are named."""
    return f"mobula-{fleet_name}"


class ReplicaPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One replica to start."""

    replica_id: str
    group: ReplicaGroup
    model: ModelSpec


class WorkerPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One worker process to start, and what it hosts."""

    worker_id: str
    node: NodeSpec
    replicas: tuple[ReplicaPlan, ...]
