"""What a Prometheus server asks the controller for over HTTP: whom to scrape, and the controller's own metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet
from cluster.replica import Replica

ADDRESS = re.compile(r"[^\s/:@]+:\d{1,5}|\[[0-9a-fA-F:.]+\]:\d{1,5}")
KEEP_ALIVE_S = 30.0  # Longer than any sane scrape interval; an idle connection is not kept for good.
_HERE = "Mobula's controller: /targets for Prometheus' HTTP service discovery, /metrics for its own metrics.\n"


class TargetGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses to scrape and labels of theirs, as Prometheus' HTTP service discovery has it."""

    targets: Sequence[str]
    labels: Mapping[str, str]


def target_groups(fleet: Fleet, replicas: Iterable[Replica], gateways: Sequence[str]) -> tuple[TargetGroup, ...]:
    """Gateways and workers that export metrics, each worker once, in order. What is no host:port is left out.

    Every target has the labels `fleet` and `component`; workers have those of their machine too.
    """
    nodes = {node.name: node for node in fleet.nodes}
    workers = {replica.metrics_endpoint: replica.node for replica in replicas if ADDRESS.fullmatch(replica.metrics_endpoint)}
    found = [
        TargetGroup(
            targets=tuple(address for address in sorted(gateways) if ADDRESS.fullmatch(address)),
            labels={"fleet": fleet.name, "component": "gateway", "__scheme__": fleet.scheme},
        )
    ]
    for address, name in sorted(workers.items()):
        labels = {"fleet": fleet.name, "component": "worker", "node": name}
        if name in nodes:
            labels |= {"pool": nodes[name].pool, "accelerator": nodes[name].accelerator}
        found.append(TargetGroup(targets=(address,), labels=labels))
    return tuple(group for group in found if group.targets)


class DiscoveryServer:
    """Serves `/targets` and `/metrics`. The controller itself is a target too."""

    def __init__(self, fleet: str, targets: Callable[[], Iterable[TargetGroup]], registry: CollectorRegistry) -> None:
        self._fleet, self._targets, self._registry = fleet, targets, registry
        self._runner: web.AppRunner | None = None
        self.address = ""
        """host:port, once started."""

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Port 0 takes a free one. Raises InvalidConfig where the port is taken."""
        app = web.Application()
        app.add_routes([web.get("/", self._here), web.get("/targets", self._show_targets), web.get("/metrics", self._show_metrics)])
        self._runner = web.AppRunner(app, access_log=None, keepalive_timeout=KEEP_ALIVE_S)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self.close()
            raise InvalidConfig(f"control.http_port {port} on {host}: {error.strerror}") from error
        taken = self._runner.addresses[0][1]
        self.address = f"[{host}]:{taken}" if ":" in host else f"{host}:{taken}"

    async def close(self) -> None:
        """Harmless when it never started."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _here(self, _: web.Request) -> web.Response:
        return web.Response(text=_HERE)

    async def _show_targets(self, _: web.Request) -> web.Response:
        own = TargetGroup(targets=(self.address,), labels={"fleet": self._fleet, "component": "controller"})
        return web.Response(body=msgspec.json.encode((*self._targets(), own)), content_type="application/json")

    async def _show_metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})
