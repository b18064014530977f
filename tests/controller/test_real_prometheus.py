"""A real Prometheus server and the controller's own window say the same of the same samples, to the last bit."""

import asyncio
import contextlib
import math
import random
import shutil
import ssl
import time
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest
import pytest_asyncio
from aiohttp import web
from prometheus_client import CollectorRegistry

from cli.local_prometheus import start_prometheus
from cluster.fleet import Fleet, ModelSpec, ReplicaGroup, TransportSpec
from cluster.metrics import ARRIVALS, DEMAND_NAMES, LATENCY_BUCKETS_S, Sample
from cluster.replica import Role
from cluster.slo import Slo
from controller.memory import Memory
from controller.observe.assemble import BUCKETS, SPAN_S, Seen, assemble
from controller.observe.discovery import DiscoveryServer, TargetGroup, target_groups
from controller.observe.prometheus import Prometheus
from controller.observe.window import Window
from tests.certificates import write_certificates

pytestmark = [
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no `prometheus` on the PATH (apt-get install prometheus)"),
    pytest.mark.asyncio(loop_scope="module"),  # One server for all: it takes five seconds to look for targets.
]

MODELS = ("m", "n")
FLEET = Fleet(
    models=tuple(ModelSpec(name=name, path=name) for name in MODELS),
    replicas=tuple(ReplicaGroup(role=Role.MIXED, model=name) for name in MODELS),
    slo={"default": Slo(ttft_s=0.3, tpot_s=0.04)},
    transport=TransportSpec(tls_dir="where its gateways find their certificates"),
)
OTHER = msgspec.structs.replace(FLEET, name="other", transport=TransportSpec())
UNTIL_SCRAPED_S = 60.0
TRIES = 5  # A scrape may fail where the machine is busy.

Pushes = list[tuple[float, list[Sample]]]


def past(rng: random.Random, start_s: float, end_s: float, instance: str) -> Pushes:
    """A gateway's samples, about one a second, with a restart among them."""
    totals: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    pushes: Pushes = []
    at_s, restart_s = start_s, rng.uniform(start_s, end_s)
    while at_s < end_s:
        if 0.0 <= at_s - restart_s < 1.0:
            totals.clear()
        for model in MODELS:
            for name, labels, risen in one_second(rng):
                key = (name, tuple(sorted({"instance": instance, "model": model, **labels}.items())))
                gauge = name in ("mobula_queue_depth", "mobula_requests_in_flight")
                totals[key] = risen if gauge else totals.get(key, 0.0) + risen
        pushes.append((round(at_s, 3), [Sample(name, labels, value) for (name, labels), value in totals.items()]))
        at_s += rng.uniform(0.9, 1.1)
    return pushes


def one_second(rng: random.Random) -> Iterator[tuple[str, dict[str, str], float]]:
    requests = rng.randint(0, 9)
    for name in DEMAND_NAMES:
        if not name.endswith("_bucket"):
            yield name, {}, requests * rng.choice((1.0, 128.0, 0.1 + 0.2))
            continue
        took_s = [rng.expovariate(10.0) for _ in range(requests)]
        for bound_s in (*LATENCY_BUCKETS_S, math.inf):
            le = "+Inf" if math.isinf(bound_s) else str(bound_s)
            yield name, {"le": le}, float(sum(value <= bound_s for value in took_s))


class Gateway:
    """Exports what it is told to, or how often it was scraped."""

    def __init__(self) -> None:
        self.text = ""
        self.address = ""
        self.scrapes = 0
        self._scraped = asyncio.Event()

    async def metrics(self, _: web.Request) -> web.Response:
        self.scrapes += 1
        self._scraped.set()
        return web.Response(text=self.text or f'mobula_arrivals_total{{model="m"}} {self.scrapes}\n')

    async def scraped(self, times: int) -> None:
        """So often; what came of all but the last is stored, since a target's scrapes follow one another."""
        async with asyncio.timeout(UNTIL_SCRAPED_S):
            while self.scrapes < times:
                self._scraped.clear()
                await self._scraped.wait()

    async def start(self, tls: ssl.SSLContext | None) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/metrics", self.metrics)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        self.address = f"127.0.0.1:{runner.addresses[0][1]}"
        return runner


def exposition(pushes: Pushes) -> str:
    """With the times the samples were taken at."""
    lines = []
    for at_s, samples in pushes:
        for sample in samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sample.labels if name != "instance")
            lines.append(f"{sample.name}{{{labels}}} {sample.value!r} {round(at_s * 1000)}\n")
    return "".join(lines)


class Watched:
    """Two gateways under TLS, one of another fleet without, and what the controller of the two would have been told by them."""

    def __init__(self) -> None:
        self.url = ""
        self.live, self.ended, self.counting = self.gateways = Gateway(), Gateway(), Gateway()
        self.now_s = round(time.time(), 3)
        self.window = Window(SPAN_S)

    def remember(self) -> None:
        rng = random.Random(7)
        live = past(rng, self.now_s - 400, self.now_s, self.live.address)
        ended = past(rng, self.now_s - 300, self.now_s - 100, self.ended.address)
        self.live.text, self.ended.text = exposition(live), exposition(ended)
        for at_s, samples in sorted(live + ended, key=lambda push: push[0]):
            self.window.add(at_s, samples)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def watched(tmp_path_factory) -> AsyncIterator[Watched]:
    made, directory = Watched(), tmp_path_factory.mktemp("prometheus")
    write_certificates(directory)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(directory / "cert.pem", directory / "key.pem")
    runners = [await gateway.start(None if gateway is made.counting else tls) for gateway in made.gateways]
    made.remember()

    def targets() -> list[TargetGroup]:
        mine = (made.live.address, made.ended.address)
        return [*target_groups(FLEET, (), mine), *target_groups(OTHER, (), (made.counting.address,))]

    discovery = DiscoveryServer(FLEET.name, targets, CollectorRegistry())
    await discovery.start()
    server = await start_prometheus(directory, directory / "ca.pem")
    server.follow(f"http://{discovery.address}/targets")
    made.url = server.url
    yield made
    await server.stop()
    await discovery.close()
    for runner in runners:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def reading(url: str, fleet: Fleet) -> AsyncIterator[Prometheus]:
    source = Prometheus(url, SPAN_S, fleet.name)
    yield source
    await source.close()


async def test_snapshots_are_identical_whoever_kept_the_samples(watched):
    own = await watched.window.series(DEMAND_NAMES, watched.now_s)
    for times in range(2, 2 + TRIES):
        await watched.live.scraped(times)
        await watched.ended.scraped(times)
        async with reading(watched.url, FLEET) as prometheus:
            theirs = await prometheus.series(DEMAND_NAMES, watched.now_s)
        if theirs == own:
            break
    assert theirs == own
    snapshots = [assemble(FLEET, Seen(), telemetry, Memory(), watched.now_s) for telemetry in (own, theirs)]
    assert msgspec.msgpack.encode(snapshots[0]) == msgspec.msgpack.encode(snapshots[1])
    for workload in snapshots[0].workloads:
        assert len(workload.buckets) == BUCKETS
        assert sum(bucket.requests for bucket in workload.buckets) > 0.0
        assert workload.ttft is not None
        assert 0.0 < workload.attainment < 1.0
        assert workload.age_s <= 3.0


async def test_prometheus_lags_by_one_sample_at_most(watched):
    """Of which there is one a second."""
    lag = math.inf
    async with reading(watched.url, OTHER) as prometheus:
        for _ in range(TRIES):
            await watched.counting.scraped(max(2, watched.counting.scrapes + 1))
            begun = watched.counting.scrapes
            found = (await prometheus.series([ARRIVALS], time.time()))[ARRIVALS]
            lag = min((begun - one.values[-1] for one in found), default=math.inf)
            if lag <= 1:
                break
    assert lag <= 1
    assert [one.labels for one in found] == [{"instance": watched.counting.address, "model": "m"}]
    assert list(found[0].values) == sorted(set(found[0].values))
