"""Where a fleet's replicas go: each named replica, and the worker process that hosts it."""

from __future__ import annotations

import msgspec

from cluster.fleet import ModelSpec, NodeSpec, ReplicaGroup

NODE_LABEL = "mobula-node"
"""The label by which a Ray node is known as one of the fleet's; its value is the node's name."""

REGISTRY_NAME = "mobula-registry"
"""The registry's actor, in the fleet's namespace."""


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
