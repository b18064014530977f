"""The worker: a process that hosts replicas, serves their tokens and KV, and says how they are.

A plain class; `worker_process.py` is the Ray actor around it. Its life is start -> warm -> ready -> drain -> stop.
It needs the registry to be found and for nothing else: with the registry gone it serves on and keeps trying to be heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol
from wsgiref.simple_server import WSGIServer

import msgspec
import numpy as np
from prometheus_client import start_http_server

from cluster.errors import Draining
from cluster.fleet import TransportSpec
from cluster.placement import WorkerPlan
from cluster.replica import Load, Phase, Replica
from transports.grpc import GrpcTransport
from transports.messages import Abort, KvChunk, KvDone, KvFailed, PrefillSource, PullKv, Report, Resync, Submit, Tokens, ToWorker
from transports.shared_memory import SharedMemoryTransport
from transports.transport import Credential, KvOutbox, Listener, Outbox, Transport
from workers.build_engine import build_engine
from workers.replica import HostedReplica, refusal
from workers.replica_metrics import ReplicaMetrics

log = logging.getLogger(__name__)

REPORT_S = 0.2  # Routers decide many times a second; ten missed reports are a hung worker.
HEARTBEAT_S = 1.0  # Five fit into the registry's patience.
HEARTBEAT_TIMEOUT_S = 2.0
DRAIN_S = 30.0  # What runs then is resumed elsewhere by its gateway.
DRAIN_POLL_S = 0.05
CLOSE_GRACE_S = 2.0


class Registry(Protocol):
    """What a worker needs of `controller.registry`."""

    async def register(self, replicas: tuple[Replica, ...]) -> None: ...

    async def heartbeat(self, worker_id: str, phases: Mapping[str, Phase]) -> bool: ...

    async def deregister(self, worker_id: str) -> None: ...


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What people look at."""

    worker_id: str
    node: str
    pid: int
    endpoint: str
    metrics_url: str
    loads: tuple[Load, ...]


class Worker:
    """Implements `transports.transport.WorkerService`."""

    def __init__(
        self,
        plan: WorkerPlan,
        transport: TransportSpec,
        secret: str,
        registry: Registry,
        host: str = "127.0.0.1",
    ) -> None:
        self.plan = plan
        self._spec = transport
        self._host = host
        self._registry = registry
        self._host_id = host_id()
        credential = Credential(secret=secret, tls_dir=transport.tls_dir)
        self._grpc: Transport = GrpcTransport(credential, kv_bytes_per_s=transport.kv_bytes_per_s)
        self._shared: Transport = SharedMemoryTransport(credential, kv_bytes_per_s=transport.kv_bytes_per_s)
        self._replicas: dict[str, HostedReplica] = {}
        self._outboxes: dict[str, Outbox] = {}
        self._listener: Listener | None = None
        self._metrics_server: WSGIServer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping: asyncio.Event | None = None
        self.stopped = False

    # Life

    async def start(self) -> None:
        """Load every engine, serve, warm, and tell the registry. Raises what an engine or the address raises, leaving nothing."""
        loop = asyncio.get_running_loop()
        try:
            for plan in self.plan.replicas:
                engine = await asyncio.to_thread(build_engine, plan.group, plan.model)
                replica = self._replicas[plan.replica_id] = HostedReplica(plan, engine, self._pull)
                await asyncio.to_thread(replica.start, loop)
            serving = self._grpc if self._spec.kv == "grpc" else self._shared
            self._listener = await serving.serve(self, self._host, 0)
            metrics = ReplicaMetrics(self._replicas.values())
            self._metrics_server, _ = start_http_server(0, self._host, metrics.registry)
            await self._registry.register(self._rows())
            for replica in self._replicas.values():
                await asyncio.to_thread(replica.engine.warm)
                replica.become_ready()
            await self._registry.register(self._rows())  # Warming has measured what was not given by a pace.
        except BaseException:
            await self.stop()
            raise
        self._tasks = [asyncio.create_task(self._report()), asyncio.create_task(self._beat())]

    async def drain(self, deadline_s: float = DRAIN_S) -> None:
        """Take nothing new, and return when the last request and KV lease has ended, or at the deadline."""
        for replica in self._replicas.values():
            replica.phase = Phase.DRAINING
        await self._heartbeat()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                while any(replica.busy for replica in self._replicas.values()):  # noqa: ASYNC110 - engines' threads end leases, too.
                    await asyncio.sleep(DRAIN_POLL_S)

    async def stop(self) -> None:
        """End everything. What still runs ends with an error that says another replica may do better. Harmless a second time."""
        if self._stopping is not None:
            await self._stopping.wait()
            return
        self._stopping = asyncio.Event()
        try:
            await self._end_all()
        finally:
            self.stopped = True
            self._stopping.set()

    async def _end_all(self) -> None:
        for task in self._tasks:
            task.cancel()
        for replica in self._replicas.values():
            replica.phase = Phase.STOPPED
            await asyncio.to_thread(replica.engine.stop)
        await asyncio.sleep(0)  # Engines' last words, queued on this loop before `stop` returned.
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._registry.deregister(self.plan.worker_id), HEARTBEAT_TIMEOUT_S)
        if self._listener is not None:
            await self._listener.close(CLOSE_GRACE_S)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.shutdown)
            self._metrics_server.server_close()

    async def status(self) -> WorkerStatus:
        now_s = time.time()
        port = "" if self._metrics_server is None else self._metrics_server.server_port
        return WorkerStatus(
            worker_id=self.plan.worker_id,
            node=self.plan.node.name,
            pid=os.getpid(),
            endpoint=self._endpoint,
            metrics_url=f"http://{self._host}:{port}/metrics",
            loads=tuple(replica.report(now_s) for replica in self._replicas.values()),
        )

    # WorkerService

    def opened(self, gateway_id: str, outbox: Outbox) -> None:
        self._outboxes[gateway_id] = outbox
        for replica in self._replicas.values():
            replica.opened(gateway_id, outbox)
        outbox.send(self._loads())

    def received(self, gateway_id: str, message: ToWorker) -> None:
        match message:
            case Submit(replica_id=replica_id):
                if replica_id in self._replicas:
                    self._replicas[replica_id].submit(gateway_id, message)
                else:
                    error = f"no replica {replica_id} on {self.plan.worker_id}"
                    refused = Tokens(replica_id=replica_id, tokens=(refusal(message, error, retry=True),))
                    self._outboxes[gateway_id].send(refused)
            case Abort():
                for replica in self._replicas.values():
                    replica.abort(gateway_id, message.request_id, message.attempt)
            case Resync(replica_id=replica_id):
                if replica_id in self._replicas:
                    self._replicas[replica_id].resync(gateway_id)

    def closed(self, gateway_id: str) -> None:
        self._outboxes.pop(gateway_id, None)
        for replica in self._replicas.values():
            replica.closed(gateway_id)

    def pulled(self, pull: PullKv, outbox: KvOutbox) -> None:
        replica = self._replicas.get(pull.replica_id)
        if replica is None or replica.prefill is None:
            outbox.end(KvFailed(message=f"no prefill replica {pull.replica_id} on {self.plan.worker_id}", retry=True))
        elif replica.phase is not Phase.READY:
            raise Draining(f"{pull.replica_id} is {replica.phase.value}, not ready")
        else:
            replica.prefill.pulled(pull, outbox)

    # What goes out by itself

    async def _pull(self, source: PrefillSource, pull: PullKv, write: Callable[[KvChunk, np.ndarray], None]) -> KvDone:
        return await self._transport_to(source.host_id).pull(source.endpoint, pull, write)

    def _transport_to(self, host: str) -> Transport:
        one_host = bool(host) and host == self._host_id
        return self._shared if one_host and self._spec.kv != "grpc" else self._grpc

    def _loads(self) -> Report:
        now_s = time.time()
        return Report(loads=tuple(replica.report(now_s) for replica in self._replicas.values()))

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            report = self._loads()
            for outbox in tuple(self._outboxes.values()):
                outbox.send(report)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self._heartbeat()

    async def _heartbeat(self) -> None:
        """Whatever goes wrong with the registry, this worker serves on."""
        phases = {replica.replica_id: replica.phase for replica in self._replicas.values()}
        try:
            async with asyncio.timeout(HEARTBEAT_TIMEOUT_S):
                if not await self._registry.heartbeat(self.plan.worker_id, phases):
                    await self._registry.register(self._rows())
        except Exception as error:
            log.warning("%s: the registry does not answer: %r", self.plan.worker_id, error)

    def _rows(self) -> tuple[Replica, ...]:
        return tuple(
            replica.row(
                self.plan.worker_id,
                self.plan.node.name,
                self._endpoint,
                self._host_id,
                replica.plan.group.pace.accelerator if replica.plan.group.pace else self.plan.node.accelerator,
            )
            for replica in self._replicas.values()
        )

    @property
    def _endpoint(self) -> str:
        return "" if self._listener is None else self._listener.endpoint


def host_id() -> str:
    """Equal for processes that share a /dev/shm. Empty where there is none, which shares with nobody."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        shm = os.stat("/dev/shm")
    except OSError:
        return ""
    return f"{boot}:{shm.st_dev}:{shm.st_ino}"
