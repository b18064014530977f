"""The controller as the process it is: a named Ray actor that Ray starts again when it dies.

Its loop has a thread to itself, and Ray's calls are handed to it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import uvloop

from cluster.errors import MobulaError, Unreachable
from cluster.fleet import Fleet
from cluster.metrics import Sample
from cluster.replica import Membership, Replica
from cluster.snapshot import Hold
from controller.act.ray_hosts import RayHosts
from controller.directory import read_fleet
from controller.fleet_controller import FleetController
from controller.status import FleetStatus, Progress
from transports.grpc import GrpcTransport
from transports.transport import Credential

Answer = TypeVar("Answer")

log = logging.getLogger(__name__)

RETRY_S = 5.0
POLL_S = 0.05


class ControllerProcess:
    """Calls are as those of `FleetController`."""

    def __init__(self, directory: str, secret: str, prometheus_url: str | None = None) -> None:
        """As FleetController. Never raises: Ray does not begin again what failed to be made."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._loop = uvloop.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="controller", daemon=True).start()
        self._fault: MobulaError | None = None
        self._made: FleetController | None = None
        self._running = asyncio.run_coroutine_threadsafe(self._run(Path(directory), secret, prometheus_url), self._loop)

    async def _run(self, directory: Path, secret: str, prometheus_url: str | None) -> None:
        """What keeps it from running is told to whoever asks, and tried again. One that fails later is begun anew, by Ray."""
        while True:
            try:
                self._made = _make(directory, secret, prometheus_url)
                self._fault = None
                await self._made.run()
            except MobulaError as error:
                log.error("the controller does not run: %s; again in %.0f s", error, RETRY_S)
                self._fault, self._made = error, None
                await asyncio.sleep(RETRY_S)
            except Exception:
                log.exception("the controller ends")
                logging.shutdown()
                os._exit(1)

    @property
    def _controller(self) -> FleetController:
        if self._made is None:
            raise self._fault or Unreachable("the controller is being made")
        return self._made

    async def register(self, replicas: tuple[Replica, ...]) -> int:
        return await self._there(lambda: self._controller.register(replicas))

    async def deregister(self, worker_id: str) -> None:
        await self._there(lambda: self._controller.registry.deregister(worker_id))

    async def failed(self, replica_id: str, error: str, permanent: bool) -> None:
        await self._there(lambda: self._controller.failed(replica_id, error, permanent))

    async def counted(self, gateway: str, data: bytes) -> None:
        samples = msgspec.msgpack.decode(data, type=tuple[Sample, ...])
        await self._there(lambda: self._controller.counted(gateway, samples))

    async def membership(self, after_version: int = -1, timeout_s: float = 0.0, gateway: str | None = None) -> Membership:
        return await self._await(self._controller.registry.membership(after_version, timeout_s, gateway))

    async def gateways(self) -> tuple[str, ...]:
        return await self._there(lambda: self._controller.registry.gateways())

    async def hold(self, hold: Hold) -> None:
        await self._await(self._controller.hold(hold))

    async def unhold(self, kinds: tuple[str, ...], target: str) -> bool:
        return await self._await(self._controller.unhold(kinds, target))

    async def reload(self, fleet: Fleet) -> None:
        await self._there(lambda: self._controller.reload(fleet))

    async def fleet(self) -> Fleet:
        return await self._there(lambda: self._controller.fleet)

    async def status(self) -> FleetStatus:
        status = await self._there(lambda: self._controller.status())
        if status is None:
            raise Unreachable("the controller has not looked around yet")
        return status

    async def progress(self) -> Progress:
        """Raises what keeps the controller from running."""
        while self._made is None and self._fault is None:  # noqa: ASYNC110 - another thread's loop makes it.
            await asyncio.sleep(POLL_S)
        return await self._there(lambda: self._controller.progress())

    async def slow(self, replica_id: str, factor: float) -> None:
        await self._await(self._controller.slow(replica_id, factor))

    async def shutdown(self, drain_s: float) -> None:
        self._running.cancel()
        await self._await(self._controller.shutdown(drain_s))

    async def _there(self, call: Any) -> Any:
        async def there() -> Any:
            return call()

        return await self._await(there())

    async def _await(self, call: Coroutine[Any, Any, Answer]) -> Answer:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, self._loop))


def _make(directory: Path, secret: str, prometheus_url: str | None) -> FleetController:
    """On the loop, to which its links and waiters belong."""
    fleet = read_fleet(directory)
    transport = GrpcTransport(Credential(secret=secret, tls_dir=fleet.transport.tls_dir))
    return FleetController(directory, lambda fleet, epoch: RayHosts(fleet, secret, epoch), transport, prometheus_url=prometheus_url)
