"""Who is there: the versioned membership table, and the named Ray actor that keeps it.

Workers register and heartbeat; gateways wait for the next version and keep their last copy when the registry is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from cluster.replica import Membership, Phase, Replica

SILENCE_S = 5.0  # Five heartbeats: a worker paused by a busy machine is not taken for dead, and nobody waits long for a dead one.
SWEEP_S = 0.5
MAX_WAIT_S = 30.0  # Of one long poll.
GATEWAY_GRACE_S = 5.0  # A gateway replica that asks again so late after its long poll is gone.


class MembershipTable:
    """Replicas by worker, with the time each worker was last heard. Time comes in; the version rises with every change."""

    def __init__(self, registry: str = "") -> None:
        self._registry = registry
        self._replicas: dict[str, Replica] = {}
        self._heard_s: dict[str, float] = {}
        self._version = 0

    @property
    def membership(self) -> Membership:
        """By replica id, so that equal tables are equal tuples."""
        replicas = tuple(self._replicas[name] for name in sorted(self._replicas))
        return Membership(version=self._version, registry=self._registry, replicas=replicas)

    def register(self, replicas: tuple[Replica, ...], now_s: float) -> None:
        """The workers named in them host exactly these from now on. Saying it again is harmless."""
        workers = {replica.worker_id for replica in replicas}
        self._heard_s.update(dict.fromkeys(workers, now_s))
        kept = {name: replica for name, replica in self._replicas.items() if replica.worker_id not in workers}
        self._become(kept | {replica.replica_id: replica for replica in replicas})

    def heartbeat(self, worker_id: str, phases: Mapping[str, Phase], now_s: float) -> bool:
        """Whether the worker is known. One that is not was lost or never came, and must register."""
        if worker_id not in self._heard_s:
            return False
        self._heard_s[worker_id] = now_s
        self._become({name: self._aged(replica, worker_id, phases, now_s) for name, replica in self._replicas.items()})
        return True

    def deregister(self, worker_id: str) -> None:
        self._heard_s.pop(worker_id, None)
        self._become({name: replica for name, replica in self._replicas.items() if replica.worker_id != worker_id})

    def sweep(self, now_s: float) -> tuple[Replica, ...]:
        """Remove the workers that were silent for more than SILENCE_S; answers with their replicas, LOST."""
        silent = {worker for worker, heard_s in self._heard_s.items() if now_s - heard_s > SILENCE_S}
        lost = tuple(replica for replica in self._replicas.values() if replica.worker_id in silent)
        for worker_id in silent:
            del self._heard_s[worker_id]
        self._become({name: replica for name, replica in self._replicas.items() if replica.worker_id not in silent})
        return tuple(msgspec.structs.replace(replica, phase=Phase.LOST) for replica in lost)

    def _aged(self, replica: Replica, worker_id: str, phases: Mapping[str, Phase], now_s: float) -> Replica:
        phase = phases.get(replica.replica_id, replica.phase)
        if replica.worker_id != worker_id or phase is replica.phase:
            return replica
        ready_since_s = now_s if phase is Phase.READY else replica.ready_since_s
        return msgspec.structs.replace(replica, phase=phase, ready_since_s=ready_since_s)

    def _become(self, replicas: dict[str, Replica]) -> None:
        if replicas != self._replicas:
            self._replicas = replicas
            self._version += 1


class Registry:
    """The actor: a membership table with a clock and with callers who wait. Made by `ray.remote(Registry)`."""

    def __init__(self) -> None:
        self._table = MembershipTable(secrets.token_hex(8))
        self._changed = asyncio.Event()
        self._lost: dict[str, Replica] = {}
        self._gateways: dict[str, float] = {}
        self._sweeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to look for silent workers."""
        if self._sweeping is None:
            self._sweeping = asyncio.create_task(self._sweep())

    async def register(self, replicas: tuple[Replica, ...]) -> None:
        for replica in replicas:
            self._lost.pop(replica.replica_id, None)
        self._table.register(replicas, time.time())
        self._tell()

    async def heartbeat(self, worker_id: str, phases: Mapping[str, Phase]) -> bool:
        """False: the worker is not known any more and must register."""
        known = self._table.heartbeat(worker_id, phases, time.time())
        self._tell()
        return known

    async def deregister(self, worker_id: str) -> None:
        self._table.deregister(worker_id)
        self._tell()

    async def membership(self, after_version: int = -1, timeout_s: float = 0.0, gateway: str | None = None) -> Membership:
        """The table as soon as its version is above `after_version`, or as it is after `timeout_s`.

        gateway: own address of the gateway replica that asks, by which others find it.
        """
        if gateway is not None:
            self._gateways[gateway] = time.time() + timeout_s + GATEWAY_GRACE_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(timeout_s, MAX_WAIT_S)):
                while self._table.membership.version <= after_version:
                    await self._changed.wait()
        return self._table.membership

    async def lost(self) -> tuple[Replica, ...]:
        """Replicas whose worker fell silent and has not come back."""
        return tuple(self._lost.values())

    async def gateways(self) -> tuple[str, ...]:
        """Addresses of the gateway replicas that have asked of late."""
        now_s = time.time()
        self._gateways = {address: due_s for address, due_s in self._gateways.items() if due_s > now_s}
        return tuple(sorted(self._gateways))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            for replica in self._table.sweep(time.time()):
                self._lost[replica.replica_id] = replica
            self._tell()

    def _tell(self) -> None:
        """Wake everyone who waits; each looks at the version for itself."""
        self._changed.set()
        self._changed = asyncio.Event()


class RegistryClient:
    """The registry as a worker or supervisor calls it, through its Ray actor handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def register(self, replicas: tuple[Replica, ...]) -> None:
        await self._handle.register.remote(replicas)

    async def heartbeat(self, worker_id: str, phases: Mapping[str, Phase]) -> bool:
        known: bool = await self._handle.heartbeat.remote(worker_id, phases)
        return known

    async def deregister(self, worker_id: str) -> None:
        await self._handle.deregister.remote(worker_id)

    async def membership(self, after_version: int = -1, timeout_s: float = 0.0) -> Membership:
        found: Membership = await self._handle.membership.remote(after_version, timeout_s)
        return found

    async def lost(self) -> tuple[Replica, ...]:
        found: tuple[Replica, ...] = await self._handle.lost.remote()
        return found

    async def gateways(self) -> tuple[str, ...]:
        found: tuple[str, ...] = await self._handle.gateways.remote()
        return found
