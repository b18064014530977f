"""What acting needs of whatever runs workers. `ray_hosts.py` is the real one."""

from __future__ import annotations

from typing import Protocol

import msgspec

from cluster.fleet import NodeSpec, ReplicaGroup
from cluster.placement import ReplicaPlan


class Inventory(msgspec.Struct, frozen=True, kw_only=True):
    """What runs, at one moment."""

    nodes: frozenset[str]
    """Names of the nodes that are up. Lags by some 15 s for one that died."""
    workers: frozenset[str]
    """Ids of the workers whose processes run, or are about to."""


class Hosts(Protocol):
    """Orders are absolute: one given twice is harmless. All raise Unreachable where nobody answers, or the worker's own error."""

    async def start(self, worker_id: str, node: NodeSpec, plan: ReplicaPlan) -> None:
        """Have the worker, made if it is not there, host this replica. Returns when that has begun."""

    async def drain(self, worker_id: str, replica_id: str, within_s: float) -> None: ...

    async def change_role(self, worker_id: str, replica_id: str, group: ReplicaGroup, within_s: float) -> None: ...

    async def slow(self, worker_id: str, replica_id: str, factor: float) -> None: ...

    async def end(self, worker_id: str, node: str, pid: int) -> None:
        """End its process by force, hung or not. pid: 0 where it never told."""

    async def probe(self, node: str) -> bool:
        """Whether the node does what it is asked, within a few seconds."""

    async def inventory(self) -> Inventory: ...
