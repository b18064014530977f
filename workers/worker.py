"""The worker: a process that hosts replicas, serves their tokens and KV, and says how they are.

A plain class; `worker_process.py` is the Ray actor around it. A replica's life is start -> warm -> ready -> drain -> gone. Orders
are absolute and return at once: what becomes of them shows in the membership table and in the load reports. The controller is
needed for orders and for nothing else: while it is gone the worker serves on, ends what was to be drained, and keeps trying to
be heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol
from wsgiref.simple_server import WSGIServer

import msgspec
import numpy as np
from prometheus_client import start_http_server

from cluster.errors import Draining, Fenced, InvalidRequest, MobulaError, Permanent
from cluster.fleet import ReplicaGroup, TransportSpec
from cluster.placement import ReplicaPlan, WorkerPlan
from cluster.replica import Load, Phase, Replica
from transports.grpc import GrpcTransport
from transports.messages import (
    WATCHER,
    Abort,
    KvChunk,
    KvDone,
    KvFailed,
    PrefillSource,
    PullKv,
    Report,
    Resync,
    Submit,
    Tokens,
    ToWorker,
)
from transports.shared_memory import SharedMemoryTransport
from transports.transport import Credential, KvOutbox, Listener, Outbox, Transport
from workers.build_engine import build_engine
from workers.replica import HostedReplica, refusal
from workers.replica_metrics import ReplicaMetrics

log = logging.getLogger(__name__)

REPORT_S = 0.2  # Routers decide many times a second; ten missed reports are a hung worker.
REPORTS_PER_WATCH = 5  # The controller decides once a second.
REGISTER_S = 1.0  # Five fit into the controller's patience with a worker it cannot reach.
REGISTER_TIMEOUT_S = 5.0
DRAIN_S = 30.0  # What runs then is resumed elsewhere by its gateway.
CLOSE_GRACE_S = 2.0


class Registry(Protocol):
    """What a worker needs of the controller."""

    async def register(self, replicas: tuple[Replica, ...]) -> int:
        """This worker hosts exactly these. The controller's epoch. Raises Fenced where others have taken their place."""

    async def deregister(self, worker_id: str) -> None: ...

    async def failed(self, replica_id: str, error: str, *, permanent: bool) -> None:
        """A replica could not be started."""


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What people look at."""

    worker_id: str
    node: str
    pid: int
    endpoint: str
    metrics_url: str
    loads: tuple[Load, ...]


class Worker:
    """Implements `transports.transport.WorkerService`. `ended` is called once it hosts nothing any more."""

    def __init__(
        self,
        plan: WorkerPlan,
        transport: TransportSpec,
        secret: str,
        registry: Registry,
        host: str = "127.0.0.1",
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.plan = plan
        self._spec = transport
        self._host = host
        self._registry = registry
        self._ended = ended
        self._host_id = host_id()
        credential = Credential(secret=secret, tls_dir=transport.tls_dir)
        self._grpc: Transport = GrpcTransport(credential, kv_bytes_per_s=transport.kv_bytes_per_s)
        self._shared: Transport = SharedMemoryTransport(credential, kv_bytes_per_s=transport.kv_bytes_per_s)
        self._replicas: dict[str, HostedReplica] = {}
        self._starting: set[str] = set()
        self._outboxes: dict[str, Outbox] = {}
        self._listener: Listener | None = None
        self._metrics_server: WSGIServer | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        """Something to register."""
        self._epoch = 0
        self._stopping: asyncio.Event | None = None
        self.stopped = False

    # Life

    async def start(self) -> None:
        """Serve, and host what the plan names. Raises what an engine or the address raises, leaving nothing."""
        try:
            await self.serve()
            await asyncio.gather(*(self._start(plan) for plan in self.plan.replicas))
            await self._register()
        except BaseException:
            await self.stop()
            raise

    async def serve(self) -> None:
        """Be reachable. Raises what the address raises."""
        serving = self._grpc if self._spec.kv == "grpc" else self._shared
        self._listener = await serving.serve(self, self._host, 0)
        metrics = ReplicaMetrics(self._replicas)
        self._metrics_server, _ = start_http_server(0, self._host, metrics.registry)
        self._do(self._report())
        self._do(self._keep_registered())

    async def drain(self, deadline_s: float = DRAIN_S) -> None:
        """Take nothing new, and return when the last request and KV lease has ended, or so many seconds later."""
        for replica in self._replicas.values():
            replica.phase = Phase.DRAINING
        await self._register()
        await asyncio.gather(*(replica.run_dry(deadline_s) for replica in self._replicas.values()))

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
            self._ended()

    async def _end_all(self) -> None:
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()
        for replica in self._replicas.values():
            replica.phase = Phase.STOPPED
            await asyncio.to_thread(replica.engine.stop)
        await asyncio.sleep(0)  # Engines' last words, queued on this loop before `stop` returned.
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._registry.deregister(self.plan.worker_id), REGISTER_TIMEOUT_S)
        if self._listener is not None:
            await self._listener.close(CLOSE_GRACE_S)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.shutdown)
            self._metrics_server.server_close()

    # Orders

    def host(self, plan: ReplicaPlan, epoch: int) -> None:
        """Have this replica. Raises Fenced for an order of an earlier epoch, as all orders do."""
        self._obey(epoch)
        if plan.replica_id not in self._replicas and plan.replica_id not in self._starting:
            self._starting.add(plan.replica_id)
            self._do(self._begin(plan))

    def drain_replica(self, replica_id: str, within_s: float, epoch: int) -> None:
        """Have it take nothing new and be gone: when the last request and KV lease has ended, or in so many seconds."""
        self._obey(epoch)
        if replica_id in self._starting:
            self._starting.discard(replica_id)
            self._end_if_idle()
        elif (replica := self._replicas.get(replica_id)) is not None and replica.phase is not Phase.DRAINING:
            replica.phase = Phase.DRAINING
            self._news.set()
            self._do(self._drain_out(replica, within_s))

    def change_role(self, replica_id: str, group: ReplicaGroup, within_s: float, epoch: int) -> None:
        """Have it in the group's role; what it has in the old one may take so many seconds to end."""
        self._obey(epoch)
        replica = self._replicas.get(replica_id)
        if replica is None or replica.phase is not Phase.READY:
            state = "not here" if replica is None else replica.phase.value
            if replica is not None and replica.plan.group.role is group.role:
                return
            raise InvalidRequest(f"{replica_id} cannot become {group.role.value}: it is {state}, not ready")
        if replica.plan.group.role is not group.role:
            self._do(self._change_role(replica, group, within_s))

    def slow(self, replica_id: str, factor: float) -> None:
        """Have a replica's steps last so many times as long, to see what comes of it."""
        if replica_id not in self._replicas:
            raise InvalidRequest(f"no replica {replica_id} on {self.plan.worker_id}")
        self._replicas[replica_id].engine.slow(factor)

    def _obey(self, epoch: int) -> None:
        if epoch < self._epoch:
            raise Fenced(f"{self.plan.worker_id} obeys epoch {self._epoch}; this order is of epoch {epoch}")
        self._epoch = epoch

    # What orders set going

    async def _begin(self, plan: ReplicaPlan) -> None:
        """Start one, or say why not."""
        try:
            await self._start(plan)
        except Exception as error:
            log.exception("%s does not start", plan.replica_id)
            text = str(error) if isinstance(error, MobulaError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(Exception):
                async with asyncio.timeout(REGISTER_TIMEOUT_S):
                    await self._registry.failed(plan.replica_id, text, permanent=isinstance(error, Permanent))
        finally:
            self._starting.discard(plan.replica_id)
            self._end_if_idle()

    async def _start(self, plan: ReplicaPlan) -> None:
        """Load, warm and open for work. One that is not wanted any more by then is dropped."""
        self._starting.add(plan.replica_id)
        engine = await asyncio.to_thread(build_engine, plan.group, plan.model)
        replica = HostedReplica(plan, engine, self._pull)
        try:
            await asyncio.to_thread(replica.start, asyncio.get_running_loop())
            self._admit(replica)
            await asyncio.to_thread(engine.warm)
        except BaseException:
            self._replicas.pop(plan.replica_id, None)
            await asyncio.to_thread(engine.stop)
            raise
        if plan.replica_id in self._starting:
            self._starting.discard(plan.replica_id)
            replica.become_ready()
            self._news.set()
        else:
            await self._let_go(replica)

    def _admit(self, replica: HostedReplica) -> None:
        if replica.replica_id in self._starting:
            self._replicas[replica.replica_id] = replica
            for gateway_id, outbox in self._gateways():
                replica.opened(gateway_id, outbox)
            self._news.set()

    async def _drain_out(self, replica: HostedReplica, within_s: float) -> None:
        await replica.run_dry(within_s)
        await self._let_go(replica)
        self._end_if_idle()

    async def _let_go(self, replica: HostedReplica) -> None:
        """Its engine's last words reach the gateways before it is gone from the table."""
        replica.phase = Phase.STOPPED
        await asyncio.to_thread(replica.engine.stop)
        await asyncio.sleep(0)
        self._replicas.pop(replica.replica_id, None)
        self._news.set()

    async def _change_role(self, replica: HostedReplica, group: ReplicaGroup, within_s: float) -> None:
        changing = asyncio.ensure_future(replica.take_role(group, within_s))
        await asyncio.sleep(0)
        self._news.set()
        await changing
        self._news.set()

    def _end_if_idle(self) -> None:
        if not self._replicas and not self._starting:
            self._do(self.stop())

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def status(self) -> WorkerStatus:
        return WorkerStatus(
            worker_id=self.plan.worker_id,
            node=self.plan.node.name,
            pid=os.getpid(),
            endpoint=self._endpoint,
            metrics_url=f"http://{self._metrics_endpoint}/metrics",
            loads=self._loads().loads,
        )

    # WorkerService

    def opened(self, gateway_id: str, outbox: Outbox) -> None:
        self._outboxes[gateway_id] = outbox
        if not gateway_id.startswith(WATCHER):
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

    def _gateways(self) -> Sequence[tuple[str, Outbox]]:
        return [(name, outbox) for name, outbox in self._outboxes.items() if not name.startswith(WATCHER)]

    @property
    def _watched(self) -> bool:
        """Whether a controller hears this worker's reports: one of the newest epoch that is known."""
        return any(int(name.removeprefix(WATCHER)) >= self._epoch for name in self._outboxes if name.startswith(WATCHER))

    async def _report(self) -> None:
        turn = 0
        while True:
            await asyncio.sleep(REPORT_S)
            turn += 1
            report = self._loads()
            for name, outbox in tuple(self._outboxes.items()):
                if turn % REPORTS_PER_WATCH == 0 or not name.startswith(WATCHER):
                    outbox.send(report)

    async def _keep_registered(self) -> None:
        """Tell the controller what is new, and that we are here for as long as it does not listen."""
        while True:
            if self._news.is_set() or not self._watched:
                self._news.clear()
                if not await self._register():
                    self._news.set()
                    await asyncio.sleep(REGISTER_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REGISTER_S):
                    await self._news.wait()

    async def _register(self) -> bool:
        """Whether the controller knows what is here. Whatever is wrong with it, this worker serves on."""
        rows = self._rows()
        if not rows:
            return True
        try:
            async with asyncio.timeout(REGISTER_TIMEOUT_S):
                epoch = await self._registry.register(rows)
        except Fenced as error:
            log.warning("%s ends: %s", self.plan.worker_id, error)
            self._do(self.stop())
            return True
        except Exception as error:
            log.warning("%s: the controller does not answer: %r", self.plan.worker_id, error)
            return False
        self._epoch = max(self._epoch, epoch)
        return True

    def _rows(self) -> tuple[Replica, ...]:
        return tuple(
            replica.row(self.plan.worker_id, self.plan.node, self._endpoint, self._metrics_endpoint, self._host_id)
            for replica in self._replicas.values()
        )

    @property
    def _endpoint(self) -> str:
        return "" if self._listener is None else self._listener.endpoint

    @property
    def _metrics_endpoint(self) -> str:
        return "" if self._metrics_server is None else f"{self._host}:{self._metrics_server.server_port}"


def host_id() -> str:
    """Equal for processes that share a /dev/shm. Empty where there is none, which shares with nobody."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        shm = os.stat("/dev/shm")
    except OSError:
        return ""
    return f"{boot}:{shm.st_dev}:{shm.st_ino}"
