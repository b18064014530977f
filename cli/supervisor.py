"""The process behind `mobula up`: holds Ray, controller and gateway, answers the other commands, and ends them all.

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
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import msgspec
import psutil

from cli.answerer import Answerer
from cli.faults import Faults
from cli.fleet_home import FleetHome, Record, identify
from cli.joined_ray import joined_ray
from cli.local_prometheus import LocalPrometheus, start_prometheus
from cli.local_ray import LocalRay, adopt_orphans, end_children, put_away, show_logs
from cluster.errors import InvalidConfig, MobulaError, Permanent, Unreachable
from cluster.fleet import Fleet
from cluster.placement import NODE_LABEL

if TYPE_CHECKING:
    from controller.controller_client import ControllerClient  # Imports Ray, which reads its environment once.

log = logging.getLogger("mobula")

DRAIN_S = 30.0  # What runs then is cut: the gateway, which would resume it elsewhere, is gone.
PROGRESS_S = 0.2
GATEWAY_STOP_S = 45.0  # Its streams have 30 s to finish.
SERVE = "serve"  # The namespace of Ray Serve's own actors.


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
    total: int = 1
    """With a phase: how many steps it has."""
    permanent: bool = False
    """With failed: the same will happen again."""


Tell = Callable[[Progress], None]


def main() -> None:
    home = FleetHome(sys.argv[1])
    order = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Order)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with os.fdopen(int(sys.argv[2]), "wb", buffering=0) as pipe:
        tell = _teller(pipe)
        try:
            _supervise(order, home, tell)
        except MobulaError as error:
            tell(Progress(kind="failed", text=str(error), permanent=isinstance(error, Permanent)))
        except SystemExit:
            tell(Progress(kind="failed", text="stopped before it was up"))
        except Exception as error:
            log.exception("the supervisor failed")
            tell(Progress(kind="failed", text=f"{type(error).__name__}: {error} (see {home.log_path})"))
    # Ray's exit handlers would wait for processes that are gone.
    logging.shutdown()
    os._exit(0)


def _supervise(order: Order, home: FleetHome, tell: Tell) -> None:
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    adopt_orphans()
    fleet = order.fleet
    url = f"{fleet.scheme}://{fleet.gateway.host}:{fleet.gateway.port}"
    directory = None if order.address else tempfile.mkdtemp(prefix="mobula-", dir="/tmp")  # Sockets' paths must be short.
    supervisor = identify(psutil.Process())
    record = Record(fleet=fleet.name, supervisor=supervisor, url=url, directory=directory, address=order.address)
    home.write_record(record)
    faults: tuple[str, ...] = ()
    try:
        with _ray(order, directory, home, tell) as local:
            signal.signal(signal.SIGTERM, _exit)  # Ray has put its own in place.
            running = _Supervisor(fleet, _secret(fleet, home), url, home, tell, local)
            faults = asyncio.run(running.run())
    finally:
        home.clear()
        if faults:
            home.write_record(msgspec.structs.replace(record, faults=faults))


@contextlib.contextmanager
def _ray(order: Order, directory: str | None, home: FleetHome, tell: Tell) -> Iterator[LocalRay | None]:
    """Connected to Ray, to a local one where there is a directory for it."""
    if directory is not None:
        count = len(order.fleet.nodes)
        tell(Progress(kind="phase", text=f"Starting Ray with {count} {'node' if count == 1 else 'nodes'}"))
        local = None
        try:
            local = LocalRay(order.fleet.nodes, NODE_LABEL, Path(directory))
            show_logs(Path(directory), home.ray_logs_path)
            yield local
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Already on the way out.
            if local is not None:
                local.stop()
            end_children()
            put_away(Path(directory), home.ray_logs_path)
    else:
        tell(Progress(kind="phase", text=f"Joining Ray at {order.address}"))
        with joined_ray(order.address):
            yield None


class _Supervisor:
    def __init__(self, fleet: Fleet, secret: str, url: str, home: FleetHome, tell: Tell, local: LocalRay | None) -> None:
        """local: the Ray that ends with the fleet; None where it is not ours."""
        self._fleet = fleet
        self._local = local
        self._secret = secret
        self._url = url
        self._home = home
        self._tell = tell
        self._stop = asyncio.Event()
        self._opening: asyncio.Future[None] | None = None
        self._served_before = False
        self._begun = False
        self._prometheus: LocalPrometheus | None = None

    async def run(self) -> tuple[str, ...]:
        """Everything up, then wait for SIGTERM, then everything down. What could not be ended in order."""
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
            faults = await self._end()
        return faults

    async def _start(self) -> None:
        from controller.start import check_nodes, start_controller

        check_nodes(self._fleet)
        if self._fleet.telemetry.local_prometheus:
            self._tell(Progress(kind="phase", text="Starting Prometheus"))
            await self._start_prometheus()
        self._begun = True
        total = sum(spec.count for spec in self._fleet.replicas)
        self._tell(Progress(kind="phase", text=f"Starting the controller and {total} replicas", total=total))
        prometheus_url = self._prometheus.url if self._prometheus else None
        controller = await start_controller(self._fleet, self._home.path, self._secret, prometheus_url)
        await self._all_ready(controller)
        self._tell(Progress(kind="phase", text="Opening the gateway"))
        await self._open_gateway()
        if self._prometheus is not None:
            status = await controller.call("status")
            self._prometheus.follow(f"{status.http_url}/targets")
        await Answerer(self._url, controller, Faults(self._local, self._prometheus)).serve(self._home.socket_path)
        self._tell(Progress(kind="ready", text=self._url))

    async def _start_prometheus(self) -> None:
        tls_dir = self._fleet.transport.tls_dir
        ca_file = None if tls_dir is None else Path(tls_dir, "ca.pem")
        self._prometheus = await start_prometheus(self._home.path / "prometheus", ca_file)

    async def _all_ready(self, controller: ControllerClient) -> None:
        """Raises why the first replica that failed did not start."""
        told: set[str] = set()
        while True:
            progress = await controller.call("progress")
            for failure in progress.failures:
                text = f"{failure.replica_id}: {failure.error}"
                raise InvalidConfig(text) if failure.permanent else Unreachable(text)
            for replica_id in progress.ready:
                if replica_id not in told:
                    told.add(replica_id)
                    self._tell(Progress(kind="step", text=replica_id))
            if len(progress.ready) >= progress.wanted:
                return
            await asyncio.sleep(PROGRESS_S)

    async def _open_gateway(self) -> None:
        import ray

        from gateway.deployment import deploy

        self._served_before = any(actor["namespace"] == SERVE for actor in ray.util.list_named_actors(all_namespaces=True))
        self._opening = asyncio.ensure_future(_apart(deploy, self._fleet, self._secret, self._local is not None))
        await asyncio.shield(self._opening)

    async def _close_gateway(self) -> None:
        from gateway.deployment import shutdown

        if self._opening is None or (self._local is not None and not self._opening.done()):
            return  # Nothing streams yet, and a local Ray ends with all that is in it.
        async with asyncio.timeout(GATEWAY_STOP_S):
            await asyncio.wait([self._opening])
            if self._opening.exception() is None:
                await _apart(shutdown, self._fleet.name)
            if self._local is None and not self._served_before:
                await _apart(_end_unused_serve)

    async def _end(self) -> tuple[str, ...]:
        """The gateway first, so that nothing new comes; then the workers, which finish what they have. An error stops nothing."""
        ends = [("gateway", self._close_gateway), ("workers", self._stop_workers)] if self._begun else []
        if self._prometheus is not None:
            ends.append(("Prometheus", self._prometheus.stop))
        faults = []
        for what, end in ends:
            try:
                await end()
            except Exception as error:
                log.exception("%s: not ended in order", what)
                faults.append(f"{what}: {str(error) or type(error).__name__}")
        return tuple(faults)

    async def _stop_workers(self) -> None:
        from controller.start import stop_controller

        served = self._opening is not None and self._opening.done()
        await stop_controller(self._fleet.name, DRAIN_S if served else 0.0)


def _secret(fleet: Fleet, home: FleetHome) -> str:
    """The operator's, or a fresh one for this start."""
    if fleet.transport.secret_file is not None:
        return Path(fleet.transport.secret_file).read_text().strip()
    secret = secrets.token_urlsafe(32)
    home.write_secret(secret)
    return secret


def _end_unused_serve() -> None:
    """What Ray Serve keeps running without an application, in a Ray that goes on."""
    from ray import serve

    if not serve.status().applications:
        serve.shutdown()


async def _apart(call: Callable[..., Any], *arguments: Any) -> None:
    """A blocking call on a thread of its own, for which nobody waits once this is cancelled."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def run() -> None:
        error = None
        try:
            call(*arguments)
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # The loop has ended without us.
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=run, daemon=True).start()
    await done


def _teller(pipe: Any) -> Tell:
    def tell(progress: Progress) -> None:
        log.info("%s: %s", progress.kind, progress.text)
        with contextlib.suppress(BrokenPipeError):  # Whoever started us need not wait.
            pipe.write(msgspec.json.encode(progress) + b"\n")

    return tell


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    main()
