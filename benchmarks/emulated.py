"""What emulated replicas cost this machine: `python -m benchmarks.emulated [--replicas 300] [--seconds 5] [--json]`.

tokens/s: one bare engine without pace, 32 streams of 64 tokens after prompts of 128, on one core and without transport.

The rest is one worker process as `mobula up` starts it, but for Ray: replicas paced as Llama-3.1-8B on H100, tokens and load
reports over gRPC to a gateway's end in this process, metrics scraped over HTTP. CPU is the worker's, as a share of one core: idle,
and with a request of 128 prompt and 64 output tokens for each replica every `PERIODS_S`, spread evenly, and one scrape after each.
Overrun steps came a whole step late.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
import urllib.request
from collections.abc import Coroutine, Mapping
from multiprocessing.connection import Connection
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from cluster.fleet import ModelSpec, NodeSpec, Pace, ReplicaGroup, TransportSpec
from cluster.performance import PerformanceModel
from cluster.placement import ReplicaPlan, WorkerPlan
from cluster.replica import Load, Phase, Replica, Role
from cluster.request import Request, SamplingParams
from transports.grpc import GrpcTransport
from transports.messages import Report, Submit, Tokens
from transports.transport import Credential, WorkerLink
from workers.engines.emulated import EmulatedEngine
from workers.engines.engine import StepOutput, Submission
from workers.engines.step_driver import ManualDriver
from workers.worker import Worker

STREAMS, OUTPUT_TOKENS, PROMPT_TOKENS = 32, 64, 128
ROUNDS = 20
PERIODS_S = {"light": 10.0, "busy": 2.0}
SECRET = "benchmark"


class Count:
    """A sink that counts tokens."""

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, output: StepOutput) -> None:
        self.tokens += len(output.tokens)


def request(name: str, number: int) -> Request:
    prompt = tuple((number * 31 + place) % 32_000 for place in range(PROMPT_TOKENS))
    return Request(request_id=name, model="m", prompt=prompt, sampling=SamplingParams(max_tokens=OUTPUT_TOKENS))


def throughput_tokens_s() -> float:
    """The best of a few rounds: what the machine's other work leaves."""
    driver, count = ManualDriver(), Count()
    unpaced = PerformanceModel(step_s=0.0, prefill_token_s=0.0)
    one = EmulatedEngine(model="m", performance=unpaced, kv_blocks=4096, context_tokens=8192, vocabulary=32_000, driver=driver)
    one.start(count)
    best = 0.0
    for number in range(ROUNDS):
        count.tokens, began_s = 0, time.perf_counter()
        for stream in range(STREAMS):
            one.submit(Submission(request=request(f"{number}-{stream}", number * STREAMS + stream)))
        driver.drain()
        best = max(best, count.tokens / (time.perf_counter() - began_s))
    return best


class Nobody:
    """A registry that takes every word and keeps none."""

    async def register(self, replicas: tuple[Replica, ...]) -> None:
        pass

    async def heartbeat(self, worker_id: str, phases: Mapping[str, Phase]) -> bool:
        return True

    async def deregister(self, worker_id: str) -> None:
        pass


def plan(replicas: int) -> WorkerPlan:
    pace = Pace(shape="llama-3.1-8b", accelerator="h100")
    group = ReplicaGroup(role=Role.MIXED, engine="emulated", pace=pace, kv_blocks=4096, count=replicas, per_worker=replicas)
    model = ModelSpec(name="m", path="m")
    hosted = tuple(ReplicaPlan(replica_id=f"mixed-{i}", group=group, model=model) for i in range(replicas))
    return WorkerPlan(worker_id="worker", node=NodeSpec(name="node"), replicas=hosted)


def serve(replicas: int, parent: Connection) -> None:
    """The worker process: says where it is, and ends at a word."""

    async def life() -> None:
        began_s = time.perf_counter()
        worker = Worker(plan(replicas), TransportSpec(kv="grpc"), SECRET, Nobody())
        await worker.start()
        status = await worker.status()
        parent.send((status.endpoint, status.metrics_url, time.perf_counter() - began_s))
        await asyncio.to_thread(parent.recv)
        await worker.stop()

    asyncio.run(life())


class Gateway:
    """A gateway's end of the stream, and what came over it."""

    def __init__(self, link: WorkerLink, replicas: int) -> None:
        self._link, self._replicas = link, replicas
        self.tokens = 0
        self.loads: dict[str, Load] = {}

    async def read(self) -> None:
        async for message in self._link.messages():
            match message:
                case Tokens(tokens=tokens):
                    self.tokens += len(tokens)
                case Report(loads=loads):
                    self.loads |= {load.replica_id: load for load in loads}

    async def offer(self, case: str, seconds: float) -> None:
        """One request for each replica in turn, at equal gaps."""
        gap_s, began_s = PERIODS_S[case] / self._replicas, time.monotonic()
        for number in range(int(seconds / gap_s)):
            await asyncio.sleep(max(began_s + number * gap_s - time.monotonic(), 0.0))
            replica = f"mixed-{number % self._replicas}"
            self._link.send(Submit(replica_id=replica, request=request(f"{case}-{number}", number), attempt=0))

    @property
    def overrun_share(self) -> float:
        return sum(load.overrun_share for load in self.loads.values()) / self._replicas


async def worker_costs(replicas: int, seconds: float) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(replicas, theirs))
    process.start()
    theirs.close()  # Else a worker that dies at its start would leave us waiting for its word.
    watched = psutil.Process(process.pid)
    try:
        endpoint, metrics_url, start_s = await asyncio.to_thread(ours.recv)
        link = await GrpcTransport(Credential(secret=SECRET)).connect(endpoint, "gateway")
        gateway = Gateway(link, replicas)
        reading = asyncio.create_task(gateway.read())
        costs = {"start_s": start_s, "idle": await _share(watched, asyncio.sleep(seconds))}
        for case in PERIODS_S:
            gateway.tokens = 0
            costs[case] = await _share(watched, gateway.offer(case, seconds))
            costs[f"{case}_tokens_s"] = gateway.tokens / seconds
            costs[f"{case}_scrape_s"] = await asyncio.to_thread(_scrape_s, metrics_url)
        costs |= {"overrun_share": gateway.overrun_share, "rss_mib": watched.memory_info().rss / 2**20}
        reading.cancel()
        await link.close()
    finally:
        ours.send("end")
        process.join()
    return costs


def _scrape_s(url: str) -> float:
    began_s = time.perf_counter()
    with urllib.request.urlopen(url) as answer:
        answer.read()
    return time.perf_counter() - began_s


async def _share(process: psutil.Process, work: Coroutine[Any, Any, None]) -> float:
    before, began_s = process.cpu_times(), time.monotonic()
    await work
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / (time.monotonic() - began_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    asked = parser.parse_args()
    costs = asyncio.run(worker_costs(asked.replicas, asked.seconds))
    tokens_s = throughput_tokens_s()
    _print(asked.replicas, costs, tokens_s)
    if asked.json:
        print(json.dumps({"tokens_s": tokens_s, "replicas": asked.replicas, **costs}))


def _print(replicas: int, costs: Mapping[str, float], tokens_s: float) -> None:
    table = Table(title=f"{replicas} emulated replicas in one worker process")
    for column in ("", "tokens/s", "of a core", "scrape"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("idle, reporting to one gateway", "0", f"{costs['idle']:.3f}", "")
    for case, period_s in PERIODS_S.items():
        name = f"a request each every {period_s:.0f} s"
        table.add_row(name, f"{costs[f'{case}_tokens_s']:,.0f}", f"{costs[case]:.3f}", f"{costs[f'{case}_scrape_s'] * 1e3:.0f} ms")
    table.add_row("one bare engine without pace", f"{tokens_s:,.0f}", "1.000", "")
    console = Console()
    console.print(table)
    console.print(
        f"ready in {costs['start_s']:.2f} s, {costs['rss_mib']:.0f} MiB, {costs['overrun_share']:.2%} of steps a whole step late"
    )


if __name__ == "__main__":
    main()
