"""The process behind `mobula up`: holds Ray, registry, workers and gateway, answers `mobula status`, and ends them all.

Run as `python -m cli.supervisor FLEET PROGRESS_FD`, by `cli/up.py`, with the fleet already checked. It says how far it is as JSON
lines on the descriptor; the last is `ready` or `failed`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import psutil

from cli.fleet_home import FleetHome, FleetStatus, Record, ReplicaStatus, identify
from cli.local_ray import LocalRay, adopt_orphans, end_children
from cluster.errors import MobulaError, Unreachable
from cluster.fleet import Fleet
from cluster.placement import NODE_LABEL
from cluster.replica import Phase, Replica

log = logging.getLogger("mobula")

STATUS_S = 2.0  # A worker that does not answer by then is shown without its load.


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What `up` hands over."""

    fleet: Fleet
    address: str | None = None
    """A Ray cluster to join; None makes a local one."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """A line to `up`."""

    kind: str
    """phase, step, ready or failed."""
    text: str
    total: int = 0
    """With a phase: how many steps it has, 0 if that is not known."""


Tell = Callable[[Progress], None]


def main() -> None:
    home = FleetHome(sys.argv[1])
    order = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Order)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with os.fdopen(int(sys.argv[2]), "wb", buffering=0) as pipe:
        try:
            _supervise(order, home, _teller(pipe))
        except MobulaError as error:
            _say_last(pipe, str(error))
        except SystemExit:
            _say_last(pipe, "stopped before it was up")
        except Exception as error:
            log.exception("the supervisor failed")
            _say_last(pipe, f"{type(error).__name__}: {error} (see {home.log_path})")
    home.clear()
    # Ray's exit handlers would wait for processes that are gone.
    logging.shutdown()
    os._exit(0)


def _supervise(order: Order, home: FleetHome, tell: Tell) -> None:
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    adopt_orphans()
    fleet = order.fleet
    url = f"http://{fleet.gateway.host}:{fleet.gateway.port}"
    record = Record(fleet=fleet.name, supervisor=identify(psutil.Process()), url=url)
    home.write_record(record)
    secret = _secret(fleet, home)
    with _ray(order, tell) as directory:
        record = msgspec.structs.replace(record, directory=directory)
        signal.signal(signal.SIGTERM, _exit)  # Ray has put its own in place.
        asyncio.run(_Supervisor(fleet, secret, record, home, tell).run())


@contextlib.contextmanager
def _ray(order: Order, tell: Tell) -> Iterator[str | None]:
    """Connected to Ray; the directory of a local one."""
    if order.address is None:
        tell(Progress(kind="phase", text=f"Starting Ray with {len(order.fleet.nodes)} nodes"))
        local = None
        try:
            local = LocalRay(order.fleet.nodes, NODE_LABEL)
            yield str(local.directory)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Already on the way out.
            if local is not None:
                local.stop()
            end_children()
    else:
        tell(Progress(kind="phase", text=f"Joining Ray at {order.address}"))
        import ray

        ray.init(address=order.address, log_to_driver=False)
        try:
            yield None
        finally:
            ray.shutdown()


class _Supervisor:
    def __init__(self, fleet: Fleet, secret: str, record: Record, home: FleetHome, tell: Tell) -> None:
        self._fleet = fleet
        self._secret = secret
        self._record = record
        self._home = home
        self._tell = tell
        self._stop = asyncio.Event()
        self._workers: Any = None
        self._registry: Any = None

    async def run(self) -> None:
        """Everything up, then wait for SIGTERM, then everything down."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop.set)
        starting = asyncio.ensure_future(self._start())
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            await stopping
        finally:
            stopping.cancel()
            await self._end()

    async def _start(self) -> None:
        from controller.act.replicas import Workers, check_nodes, start_registry
        from controller.config import expand

        check_nodes(self._fleet)
        self._registry = await start_registry(self._fleet)
        plans = expand(self._fleet)
        self._workers = Workers(self._fleet, self._secret, self._registry)
        self._tell(Progress(kind="phase", text="Starting replicas", total=len(plans)))
        await self._workers.start(plans, lambda plan: self._tell(Progress(kind="step", text=plan.worker_id)))
        self._tell(Progress(kind="phase", text="Opening the gateway"))
        await self._open_gateway()
        await asyncio.start_unix_server(self._answer, self._home.socket_path)
        processes = tuple(identify(child) for child in _children())
        self._home.write_record(msgspec.structs.replace(self._record, processes=processes))
        self._tell(Progress(kind="ready", text=self._record.url))

    async def _open_gateway(self) -> None:
        from gateway.deployment import deploy

        await asyncio.to_thread(deploy, self._fleet, self._secret)

    async def _end(self) -> None:
        """The gateway first, so that nothing new comes; then the workers, which finish what they have."""
        if self._workers is not None:
            with contextlib.suppress(Exception):
                from gateway.deployment import shutdown

                await asyncio.to_thread(shutdown, self._fleet.name)
            await self._workers.stop()

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One status to whoever connects."""
        try:
            writer.write(msgspec.json.encode(await self._status()))
            await writer.drain()
        finally:
            writer.close()

    async def _status(self) -> FleetStatus:
        membership = await self._registry.membership()
        lost = await self._registry.lost()
        rows = (*membership.replicas, *lost)
        workers = sorted({row.worker_id for row in rows})
        answers = await asyncio.gather(*map(self._ask, workers))
        by_worker = dict(zip(workers, answers, strict=True))
        return FleetStatus(
            fleet=self._fleet.name,
            url=self._record.url,
            version=membership.version,
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


def _secret(fleet: Fleet, home: FleetHome) -> str:
    """The operator's, or a fresh one for this start."""
    if fleet.transport.secret_file is not None:
        return Path(fleet.transport.secret_file).read_text().strip()
    secret = secrets.token_urlsafe(32)
    home.write_secret(secret)
    return secret


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _teller(pipe: Any) -> Tell:
    def tell(progress: Progress) -> None:
        log.info("%s: %s", progress.kind, progress.text)
        with contextlib.suppress(BrokenPipeError):  # Whoever started us need not wait.
            pipe.write(msgspec.json.encode(progress) + b"\n")

    return tell


def _say_last(pipe: Any, message: str) -> None:
    log.error("%s", message)
    _teller(pipe)(Progress(kind="failed", text=message))


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    main()
