"""Gateway replicas as a Ray Serve application.

Serve starts, checks and stops them, nothing more: each listens itself, on a port they share, since Serve's own proxy costs several
times what a gateway does. A replica's server runs on a loop and thread of its own, so that Serve's calls and the streams do not
wait for each other.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading

import msgspec
import ray
import uvloop
from fastapi import FastAPI
from ray import serve
from ray.serve.config import ProxyLocation

from cluster.errors import Unreachable, error_in
from cluster.fleet import Fleet
from cluster.metrics import Sample
from cluster.placement import CONTROLLER_NAME, namespace_of
from gateway.app import build_app
from gateway.membership import follow_registry, known_gateways
from gateway.port import refuse_strangers
from gateway.routers import make_router
from gateway.serve_process import drain_at_sigterm, stay_on_loopback
from gateway.server import DRAIN_S, GatewayServer, address_of, listen
from gateway.telemetry import Push
from transports.grpc import GrpcTransport
from transports.transport import Credential

HEAD_NODE = "node:__internal_head__"  # A resource that Ray gives to the node of its head.
FIRST_TABLE_S = 5.0  # A controller answers within milliseconds; one that restarts, within three seconds.
START_S = 60.0  # The router's compilation, on a machine that never ran it, is most of it.


def application_of(fleet_name: str) -> str:
    """The Serve application's name."""
    return f"mobula-{fleet_name}"


def deploy(fleet: Fleet, secret: str, on_head: bool = False) -> None:
    """Start the gateway's replicas; returns when all listen. Blocks. Raises what one raised, or Unreachable; nothing is left.

    on_head: on the node of Ray's head alone, where it is a node that hosts no worker.
    """
    serve.start(proxy_location=ProxyLocation.Disabled)
    deployment = serve.deployment(
        GatewayReplica,
        name="gateway",
        num_replicas=fleet.gateway.replicas,
        ray_actor_options={"num_cpus": 0, "resources": {HEAD_NODE: 0.001} if on_head else {}},
        graceful_shutdown_timeout_s=DRAIN_S + 5,
        health_check_period_s=5,
    )
    try:
        serve.run(deployment.bind(msgspec.msgpack.encode(fleet), secret), name=application_of(fleet.name), route_prefix=None)
    except RuntimeError as error:
        said = serve.status().applications.get(application_of(fleet.name))
        shutdown(fleet.name)
        report = " ".join(one.message for one in said.deployments.values()) if said else str(error)
        raise error_in(report) or Unreachable(f"the gateway did not start: {report.strip().splitlines()[-1]}") from error


def shutdown(fleet_name: str) -> None:
    """Drain and end the gateway's replicas. Blocks. Harmless without any."""
    serve.delete(application_of(fleet_name))


class GatewayReplica:
    """One gateway process."""

    def __init__(self, fleet_data: bytes, secret: str) -> None:
        stay_on_loopback()
        fleet = msgspec.msgpack.decode(fleet_data, type=Fleet)
        started: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, GatewayServer]] = concurrent.futures.Future()
        self._thread = threading.Thread(target=_serve, args=(fleet, secret, started), name="gateway", daemon=True)
        self._thread.start()
        self._loop, self._server = started.result(START_S)
        drain_at_sigterm(self._drain, self._thread)

    def check_health(self) -> None:
        if not self._thread.is_alive():
            raise Unreachable("the gateway's server has ended")

    def __del__(self) -> None:
        """Serve's word for a graceful end: accept nothing more, finish what streams, within the drain's bound."""
        if self._thread.is_alive():
            self._drain()
            self._thread.join(DRAIN_S + 5)

    def _drain(self) -> None:
        self._loop.call_soon_threadsafe(self._server.drain)


def _serve(fleet: Fleet, secret: str, started: concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, GatewayServer]]) -> None:
    """The thread: builds the application, says that it listens (or why not), and serves until drained."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            own = listen(fleet.gateway.host, 0)
            app = _application(fleet, secret, address_of(own))
            refuse_strangers(fleet.gateway.host, fleet.gateway.port, lambda: known_gateways(namespace_of(fleet.name)))
            server = GatewayServer(app, fleet.gateway, own=own, tls_dir=fleet.transport.tls_dir)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result((runner.get_loop(), server))
        runner.run(server.serve())


def _pusher(namespace: str, address: str) -> Push:
    """Tells the controller, found by name, this replica's counters; when they were taken it sees for itself."""
    handle = None

    async def push(at_s: float, samples: tuple[Sample, ...]) -> None:
        nonlocal handle
        try:
            handle = handle or await asyncio.to_thread(ray.get_actor, CONTROLLER_NAME, namespace)
            await handle.counted.remote(address, msgspec.msgpack.encode(samples))
        except Exception:
            handle = None
            raise

    return push


def _application(fleet: Fleet, secret: str, address: str) -> FastAPI:
    transport = GrpcTransport(Credential(secret=secret, tls_dir=fleet.transport.tls_dir))
    return build_app(
        spec=fleet.gateway,
        models={model.name: model for model in fleet.models},
        membership=lambda: follow_registry(namespace_of(fleet.name), address),
        transport=transport,
        router=make_router(fleet.routing),
        slos=fleet.slo,
        address=address,
        push=_pusher(namespace_of(fleet.name), address),
        first_table_s=FIRST_TABLE_S,
    )
