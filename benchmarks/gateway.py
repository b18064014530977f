"""What the gateway adds to time to first token, and how many streams it carries.

Three processes: a worker with one emulated replica that takes no time, the gateway (routing, keys, metrics and gRPC on), and
this one, the client: a bare HTTP/1.1 reader that takes little of the machine it shares.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import secrets
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import uvloop
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.fleet import GatewaySpec, ModelSpec, NodeSpec, Pace, ReplicaGroup, TransportSpec
from cluster.placement import ReplicaPlan, WorkerPlan
from cluster.replica import Membership, Replica, Role
from cluster.request import Request, SamplingParams
from cluster.slo import Slo
from gateway.app import build_app
from gateway.keys import add_key
from gateway.server import GatewayServer
from policies.routing import PredictedLatencyRouter
from transports.grpc import GrpcTransport
from transports.transport import Credential
from workers.build_engine import build_engine
from workers.engines.engine import StepOutput, Submission
from workers.worker import Worker

OUTPUT_TOKENS = 64
PROMPT_TOKENS = 128
CONNECTIONS = 32
STREAMS = 2000
WARM_STREAMS = 200
IDLE_REQUESTS = 200
VOCABULARY = 512  # The short text fills it.
PASSAGE = Path(__file__).parent.parent / "workloads" / "passage.txt"
END = b"data: [DONE]\n\n"
BARS = {"added_ttft_ms_p50": "at most 12", "streams_per_s": "at least 500", "cpu_ms_per_stream": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        save_tokenizer(Path(directory))
        figures = _measure(directory)
    table = Table("figure", "measured", "bar", title=f"Gateway, {os.cpu_count()} cores, client included")
    for name, value in figures.items():
        table.add_row(name, f"{value:.2f}", BARS.get(name, ""))
    Console().print(table)
    if arguments.json:
        print(json.dumps(figures))


def _measure(directory: str) -> dict[str, float]:
    engine_ttft_s = _engine_ttft_s(directory)
    key = add_key(f"{directory}/keys", "bench")
    with _child(_worker, directory, "secret") as rows, _child(_gateway, directory, "secret", rows.recv()) as gateway:
        port = gateway.recv()
        here = psutil.Process()
        others = here.children(recursive=True)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_streams(port, key, WARM_STREAMS))
            ttft_s = runner.run(_idle_ttft_s(port, key))
            before_s, client_s = _cpu_s(others), _cpu_s([here])
            started_s = time.perf_counter()
            runner.run(_streams(port, key, STREAMS))
            elapsed_s = time.perf_counter() - started_s
        spent_s, client_s = _cpu_s(others) - before_s, _cpu_s([here]) - client_s
    return {
        "added_ttft_ms_p50": 1e3 * (ttft_s - engine_ttft_s),
        "streams_per_s": STREAMS / elapsed_s,
        "cpu_ms_per_stream": 1e3 * (spent_s + client_s) / STREAMS,
        "client_cpu_ms_per_stream": 1e3 * client_s / STREAMS,
        "engine_ttft_ms_p50": 1e3 * engine_ttft_s,
    }


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _plan(directory: str) -> WorkerPlan:
    model = ModelSpec(name="bench", path=directory)
    pace = Pace(shape="tiny-dense", accelerator="cpu", speedup=1e9)
    group = ReplicaGroup(role=Role.MIXED, model="bench", engine="emulated", pace=pace, kv_blocks=4096)
    return WorkerPlan(
        worker_id="worker-0",
        node=NodeSpec(name="local"),
        replicas=(ReplicaPlan(replica_id="mixed-0", group=group, model=model),),
    )


def _prompt(chance: random.Random) -> list[int]:
    return [chance.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)]


def _engine_ttft_s(directory: str) -> float:
    """The same engine, called here."""
    plan = _plan(directory).replicas[0]
    engine, chance, times = build_engine(plan.group, plan.model), random.Random(0), []
    loop = asyncio.new_event_loop()
    first: asyncio.Queue[None] = asyncio.Queue()

    def sink(output: StepOutput) -> None:
        if any(token.index == 0 for token in output.tokens):
            loop.call_soon_threadsafe(first.put_nowait, None)

    async def one(number: int) -> None:
        sampling = SamplingParams(max_tokens=OUTPUT_TOKENS)
        request = Request(request_id=str(number), model="bench", prompt=tuple(_prompt(chance)), sampling=sampling)
        started_s = time.perf_counter()
        engine.submit(Submission(request=request))
        await first.get()
        times.append(time.perf_counter() - started_s)
        await asyncio.sleep(0.01)

    engine.start(sink)
    for number in range(IDLE_REQUESTS):
        loop.run_until_complete(one(number))
    engine.stop()
    loop.close()
    return statistics.median(times)


class _Roster:
    """Stands in for the registry: hands the worker's rows to the parent once they are ready."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    async def register(self, replicas: tuple[Replica, ...]) -> None:
        if all(row.ready_since_s is not None for row in replicas):
            self._pipe.send(replicas)

    async def heartbeat(self, worker_id: str, phases: object) -> bool:
        return True

    async def deregister(self, worker_id: str) -> None:
        return


def _worker(pipe: Connection, directory: str, secret: str) -> None:
    async def serve() -> None:
        await Worker(_plan(directory), TransportSpec(), secret, _Roster(pipe)).start()
        await asyncio.Event().wait()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


def _gateway(pipe: Connection, directory: str, secret: str, rows: tuple[Replica, ...]) -> None:
    async def membership() -> AsyncIterator[Membership]:
        yield Membership(version=1, replicas=rows)

    spec = GatewaySpec(port=0, keys_file=f"{directory}/keys", request_log=f"{directory}/log")
    router = PredictedLatencyRouter()
    router.warm()
    app = build_app(
        spec=spec,
        models={"bench": ModelSpec(name="bench", path=directory)},
        membership=membership,
        transport=GrpcTransport(Credential(secret=secret)),
        router=router,
        slos={"default": Slo(ttft_s=1.0, tpot_s=0.1)},
    )
    server = GatewayServer(app, spec)
    pipe.send(server.port)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.serve())


@contextlib.contextmanager
def _child(target: object, *arguments: object) -> Iterator[Connection]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


async def _streams(port: int, key: str, count: int) -> None:
    left = iter(range(count))

    async def client(number: int) -> None:
        chance, connection = random.Random(number), await _Connection.open(port, key)
        for _ in left:
            await connection.ask(_prompt(chance))
        connection.close()

    await asyncio.gather(*map(client, range(CONNECTIONS)))


async def _idle_ttft_s(port: int, key: str) -> float:
    chance, connection, times = random.Random(secrets.randbits(32)), await _Connection.open(port, key), []
    for _ in range(IDLE_REQUESTS):
        times.append(await connection.ask(_prompt(chance)))
        await asyncio.sleep(0.01)
    connection.close()
    return statistics.median(times)


class _Connection:
    """One kept-alive HTTP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str) -> None:
        self._reader = reader
        self._writer = writer
        self._key = key

    @classmethod
    async def open(cls, port: int, key: str) -> _Connection:
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                connection = cls(*await asyncio.open_connection("127.0.0.1", port), key)
                if await connection._ready():
                    return connection
                connection.close()
            await asyncio.sleep(0.05)

    async def ask(self, prompt: list[int]) -> float:
        """Seconds to the first event of a whole stream."""
        body = json.dumps({"model": "bench", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {self._key}\r\n"
        started_s = time.perf_counter()
        self._writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        data, first_s = b"", None
        while not data.endswith(b"0\r\n\r\n"):
            data += (piece := await self._reader.read(65536))
            if first_s is None and b"data: " in data:
                first_s = time.perf_counter() - started_s
            if not piece:
                raise RuntimeError(f"the gateway hung up after {data[-300:]!r}")
        if data.count(b"data: {") != OUTPUT_TOKENS or END not in data:
            raise RuntimeError(f"{data.count(b'data: {')} events, not {OUTPUT_TOKENS}: {data[:300]!r}")
        return first_s

    async def _ready(self) -> bool:
        self._writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = await self._reader.readuntil(b"}")
        return b"200 OK" in answer

    def close(self) -> None:
        self._writer.close()


def save_tokenizer(directory: Path) -> None:
    """A byte-level one, trained in a moment."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train([str(PASSAGE)], trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text("{}")


if __name__ == "__main__":
    main()
