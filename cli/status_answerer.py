"""What the supervisor answers to `mobula status`: the membership table, and each worker's own word on its load."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from cli.fleet_home import FleetStatus, ReplicaStatus
from cluster.errors import Unreachable
from cluster.fleet import Fleet
from cluster.replica import Phase, Replica
from controller.registry import RegistryClient

STATUS_S = 2.0  # A worker that does not answer by then is shown without its load.


class StatusAnswerer:
    """Asks registry and workers anew for each who connects."""

    def __init__(self, fleet: Fleet, url: str, registry: RegistryClient, workers: Any) -> None:
        self._fleet, self._url, self._registry, self._workers = fleet, url, registry, workers

    async def answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One status to whoever connects."""
        try:
            writer.write(msgspec.json.encode(await self._status()))
            await writer.drain()
        finally:
            writer.close()

    async def _status(self) -> FleetStatus:
        membership = await self._registry.membership()
        lost, gateways = await self._registry.lost(), await self._registry.gateways()
        rows = (*membership.replicas, *lost)
        workers = sorted({row.worker_id for row in rows})
        answers = await asyncio.gather(*map(self._ask, workers))
        by_worker = dict(zip(workers, answers, strict=True))
        return FleetStatus(
            fleet=self._fleet.name,
            url=self._url,
            version=membership.version,
            gateways=tuple(f"{self._fleet.scheme}://{address}" for address in gateways),
            replicas=tuple(_row(row, by_worker[row.worker_id]) for row in rows),
        )

    async def _ask(self, worker_id: str) -> Any:
        """A worker's status; None from one that drains or is stuck, LOST from one that is gone."""
        try:
            return await self._workers.call(worker_id, "status", STATUS_S)
        except TimeoutError:
            return None
        except Unreachable:
            return Phase.LOST


def _row(row: Replica, worker: Any) -> ReplicaStatus:
    status = ReplicaStatus(
        replica_id=row.replica_id,
        role=row.role.value,
        phase=(worker if isinstance(worker, Phase) else row.phase).value,
        model=row.model,
        node=row.node,
        worker_id=row.worker_id,
        endpoint=row.endpoint,
        kv_blocks=row.kv_blocks,
    )
    if worker is None or isinstance(worker, Phase):
        return status
    load = next(load for load in worker.loads if load.replica_id == row.replica_id)
    return msgspec.structs.replace(
        status,
        pid=worker.pid,
        metrics_url=worker.metrics_url,
        running=load.running,
        waiting=load.waiting,
        kv_blocks_used=load.kv_blocks_used,
        step_s=load.step_s,
        power_w=load.power_w,
    )
