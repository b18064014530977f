"""One stream to each worker of the membership table: reconnected when it breaks, reported when it is silent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Protocol

from cluster.errors import MobulaError, Unreachable
from cluster.replica import Membership, Phase
from transports.messages import FromWorker, ToWorker
from transports.transport import Transport, WorkerLink

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0  # A worker that comes back is used again within two seconds.
CHECKS_PER_SILENCE = 8  # Silence is noticed at most an eighth late.

_GONE = (Phase.STOPPED, Phase.LOST)


class Listener(Protocol):
    """Who hears what links say. Called on the loop; may not block."""

    def heard(self, worker_id: str, message: FromWorker) -> None: ...

    def lost(self, worker_id: str, cause: str) -> None:
        """The stream broke ("broken") or nothing came for `silence_s` ("silent"). A silent one may be heard again."""

    def busy(self, worker_id: str) -> bool:
        """Whether its stream still carries a request."""


class _Link:
    """State of one worker's stream."""

    def __init__(self) -> None:
        self.stream: WorkerLink | None = None
        self.heard_s = 0.0
        self.silent = False
        self.task: asyncio.Task[None] | None = None


class WorkerLinks:
    def __init__(
        self,
        transport: Transport,
        gateway_id: str,
        listener: Listener,
        *,
        silence_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._gateway_id = gateway_id
        self._listener = listener
        self._silence_s = silence_s
        self._clock = clock
        self._endpoints: dict[str, str] = {}
        self._links: dict[str, _Link] = {}
        self._checked_s = clock()

    def update(self, membership: Membership) -> None:
        """Links to exactly the table's workers, and to those that still stream to us, until that stream ends."""
        before = self._endpoints
        self._endpoints = {row.worker_id: row.endpoint for row in membership.replicas if row.phase not in _GONE}
        for worker_id in list(self._links):
            if self._endpoints.get(worker_id) != before.get(worker_id) and not self._listener.busy(worker_id):
                self._links.pop(worker_id).task.cancel()
        for worker_id in self._endpoints:
            if worker_id not in self._links:
                link = self._links[worker_id] = _Link()
                link.task = asyncio.create_task(self._keep(worker_id, link))

    def connected(self, worker_id: str) -> bool:
        link = self._links.get(worker_id)
        return link is not None and link.stream is not None

    def send(self, worker_id: str, message: ToWorker) -> None:
        """Raises Unreachable where there is no stream."""
        link = self._links.get(worker_id)
        if link is None or link.stream is None:
            raise Unreachable(f"worker {worker_id}: not connected")
        link.stream.send(message)

    def check_silence(self) -> None:
        """Report the links on which nothing came for `silence_s`. Time this process itself was held up does not count."""
        now_s = self._clock()
        held_up_s = now_s - self._checked_s - 2 * self.check_interval_s
        self._checked_s = now_s
        for worker_id, link in list(self._links.items()):
            if held_up_s > 0:
                link.heard_s += held_up_s
            if link.stream is not None and not link.silent and now_s - link.heard_s > self._silence_s:
                link.silent = True
                self._listener.lost(worker_id, "silent")

    @property
    def check_interval_s(self) -> float:
        return self._silence_s / CHECKS_PER_SILENCE

    async def close(self) -> None:
        links, self._links = list(self._links.values()), {}
        for link in links:
            link.task.cancel()
        await asyncio.gather(*(link.task for link in links), return_exceptions=True)

    async def _keep(self, worker_id: str, link: _Link) -> None:
        """Connect, listen and connect again, for as long as the table has the worker."""
        backoff_s = FIRST_BACKOFF_S
        while (endpoint := self._endpoints.get(worker_id)) is not None:
            try:
                stream = await self._transport.connect(endpoint, self._gateway_id)
                backoff_s = FIRST_BACKOFF_S
                await self._listen(worker_id, link, stream)
            except MobulaError as error:
                logger.warning("worker %s at %s: %s; again in %.2f s", worker_id, endpoint, error, backoff_s)
            except Exception:  # Ours; without the link its worker would be lost to this gateway.
                logger.exception("worker %s at %s; again in %.2f s", worker_id, endpoint, backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
        if self._links.get(worker_id) is link:
            del self._links[worker_id]

    async def _listen(self, worker_id: str, link: _Link, stream: WorkerLink) -> None:
        link.stream, link.heard_s, link.silent = stream, self._clock(), False
        try:
            async for message in stream.messages():
                link.heard_s, link.silent = self._clock(), False
                self._listener.heard(worker_id, message)
        finally:
            link.stream = None
            self._listener.lost(worker_id, "broken")
            with contextlib.suppress(MobulaError):
                await stream.close()
