"""Who is there: the versioned membership table, which gateways follow and workers register in."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

import msgspec

from cluster.errors import Fenced
from cluster.replica import Membership, Phase, Replica

MAX_WAIT_S = 30.0  # Of one long poll.
GATEWAY_GRACE_S = 5.0  # A gateway replica that asks again so late after its long poll is gone.


class MembershipTable:
    """Replicas by worker. The version rises with every change."""

    def __init__(self, registry: str = "") -> None:
        self._replicas: dict[str, Replica] = {}
        self._membership = Membership(version=0, registry=registry)

    @property
    def membership(self) -> Membership:
        """By replica id, so that equal tables are equal tuples."""
        return self._membership

    @property
    def replicas(self) -> Mapping[str, Replica]:
        return self._replicas

    def register(self, replicas: tuple[Replica, ...]) -> None:
        """The workers named in them host exactly these from now on. Saying it again is harmless."""
        workers = {replica.worker_id for replica in replicas}
        kept = {name: replica for name, replica in self._replicas.items() if replica.worker_id not in workers}
        self._become(kept | {replica.replica_id: replica for replica in replicas})

    def phases(self, worker_id: str, phases: Mapping[str, Phase], now_s: float) -> None:
        """What a worker says of its own replicas; of others' it says nothing."""
        changed = {}
        for name, phase in phases.items():
            replica = self._replicas.get(name)
            if replica is not None and replica.worker_id == worker_id and replica.phase is not phase:
                changed[name] = _aged(replica, phase, now_s)
        if changed:
            self._become(self._replicas | changed)

    def remove_worker(self, worker_id: str) -> tuple[Replica, ...]:
        """Answers with what it hosted."""
        gone = tuple(replica for replica in self._replicas.values() if replica.worker_id == worker_id)
        self._become({name: replica for name, replica in self._replicas.items() if replica.worker_id != worker_id})
        return gone

    def _become(self, replicas: dict[str, Replica]) -> None:
        if replicas != self._replicas:
            self._replicas = replicas
            rows = tuple(replicas[name] for name in sorted(replicas))
            self._membership = msgspec.structs.replace(self._membership, version=self._membership.version + 1, replicas=rows)


def _aged(replica: Replica, phase: Phase, now_s: float) -> Replica:
    return msgspec.structs.replace(replica, phase=phase, ready_since_s=now_s if phase is Phase.READY else replica.ready_since_s)


class Registry:
    """A membership table with callers who wait for its changes, and with those who may not come back."""

    def __init__(self, name: str, epoch: int, changed: Callable[[], None] = lambda: None) -> None:
        """name: tells this registry from the one before. changed: called after each change of the table."""
        self.table = MembershipTable(name)
        self.fenced: set[str] = set()
        """Replicas whose place has been given away."""
        self._epoch = epoch
        self._told = changed
        self._changed = asyncio.Event()
        self._gateways: dict[str, float] = {}

    def register(self, replicas: tuple[Replica, ...]) -> int:
        """The epoch. Raises Fenced where one of them was given up and may have been replaced."""
        back = sorted(replica.replica_id for replica in replicas if replica.replica_id in self.fenced)
        if back:
            raise Fenced(f"{', '.join(back)}: given up after a silence, and replaced")
        self.table.register(replicas)
        self.tell()
        return self._epoch

    def deregister(self, worker_id: str) -> None:
        self.table.remove_worker(worker_id)
        self.tell()

    async def membership(self, after_version: int = -1, timeout_s: float = 0.0, gateway: str | None = None) -> Membership:
        """The table as soon as its version is above `after_version`, or as it is after `timeout_s`.

        gateway: own address of the gateway replica that asks, by which others find it.
        """
        if gateway is not None:
            self._gateways[gateway] = time.monotonic() + timeout_s + GATEWAY_GRACE_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(timeout_s, MAX_WAIT_S)):
                while self.table.membership.version <= after_version:
                    await self.changed()
        return self.table.membership

    async def changed(self) -> None:
        """Until the table's next change."""
        await self._changed.wait()

    def gateways(self) -> tuple[str, ...]:
        """Addresses of the gateway replicas that have asked of late."""
        now_s = time.monotonic()
        self._gateways = {address: due_s for address, due_s in self._gateways.items() if due_s > now_s}
        return tuple(sorted(self._gateways))

    def tell(self) -> None:
        """Wake everyone who waits; each looks at the version for itself."""
        self._changed.set()
        self._changed = asyncio.Event()
        self._told()
