"""How fast KV moves between two processes, and what of it a request waits for.

`gb_per_s` is a prompt's KV pulled as fast as it goes. `ttft_s` is a pull while a paced prefill computes layer by layer, its KV
sent whole after the compute or layered, as each layer is done; `share` is the part of it that is not compute.

    python -m benchmarks.kv_transfer [--json]
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import statistics
import threading
import time
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from cluster.handoff import RequestState
from cluster.kv import KvLayout
from cluster.request import Request, SamplingParams
from transports.grpc import GrpcTransport
from transports.messages import KvChunk, KvDone, PullKv
from transports.shared_memory import SharedMemoryTransport
from transports.transport import Credential, KvOutbox

KINDS = {"grpc": GrpcTransport, "shared_memory": SharedMemoryTransport}
LINKS: dict[str, float | None] = {"free": None, "200 MB/s": 200e6}
LAYOUT = KvLayout(layers=28, kv_heads=8, head_dim=128, dtype="float16")
PROMPT_TOKENS = 1024
COMPUTE_S = 1.0
REPEATS = 5
CREDENTIAL = Credential(secret="benchmark")


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    transport: str
    gb_per_s: float


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """Medians over the repeats."""

    transport: str
    link: str
    sent: str
    ttft_s: float
    share: float


class Prefill:
    """A worker whose engine sleeps instead of computing; the replica asked for says how."""

    def __init__(self) -> None:
        shape = (2, PROMPT_TOKENS, LAYOUT.kv_heads, LAYOUT.head_dim)
        self._kv = np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(np.float16)

    def pulled(self, pull: PullKv, outbox: KvOutbox) -> None:
        threading.Thread(target=self._compute, args=(pull, outbox), daemon=True).start()

    def _compute(self, pull: PullKv, outbox: KvOutbox) -> None:
        layer_s = 0.0 if pull.replica_id == "at once" else COMPUTE_S / LAYOUT.layers
        started_s = time.monotonic()
        for layer in range(LAYOUT.layers):
            time.sleep(max(0.0, started_s + (layer + 1) * layer_s - time.monotonic()))
            if pull.replica_id == "layered":
                self._put(layer, outbox)
        if pull.replica_id != "layered":
            for layer in range(LAYOUT.layers):
                self._put(layer, outbox)
        state = RequestState(request=pull.request, generated=(0,))
        outbox.end(KvDone(state=state, queue_s=0.0, prefill_s=layer_s * LAYOUT.layers, cached_tokens=0))

    def _put(self, layer: int, outbox: KvOutbox) -> None:
        outbox.put(KvChunk(layer=layer, first_token=0, tokens=PROMPT_TOKENS), self._kv)


def serve(kind: str, bytes_per_s: float | None, pipe: Connection) -> None:
    """The prefill process; ends when the other end of `pipe` says so."""

    async def run() -> None:
        listener = await KINDS[kind](CREDENTIAL, kv_bytes_per_s=bytes_per_s).serve(Prefill(), "127.0.0.1", 0)
        pipe.send(listener.endpoint)
        await asyncio.to_thread(pipe.recv)
        await listener.close(0)

    asyncio.run(run())


def pulls_s(kind: str, bytes_per_s: float | None, modes: tuple[str, ...]) -> list[float]:
    """Median seconds of a pull in each mode, from a prefill process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(kind, bytes_per_s, theirs))
    process.start()
    try:
        return asyncio.run(_pulls_s(kind, ours.recv(), modes))
    finally:
        ours.send(None)
        process.join()


async def _pulls_s(kind: str, endpoint: str, modes: tuple[str, ...]) -> list[float]:
    transport = KINDS[kind](CREDENTIAL)
    pool = np.empty((LAYOUT.layers, 2, PROMPT_TOKENS, LAYOUT.kv_heads, LAYOUT.head_dim), dtype=np.float16)
    pool.fill(0)

    def write(chunk: KvChunk, kv: np.ndarray) -> None:
        pool[chunk.layer, :, chunk.first_token : chunk.first_token + chunk.tokens] = kv

    async def once_s(mode: str) -> float:
        started_s = time.perf_counter()
        await transport.pull(endpoint, _pull(mode), write)
        return time.perf_counter() - started_s

    await once_s("at once")
    return [statistics.median([await once_s(mode) for _ in range(REPEATS)]) for mode in modes]


def _pull(mode: str) -> PullKv:
    request = Request(request_id="r", model="m", prompt=(1,) * PROMPT_TOKENS, sampling=SamplingParams(max_tokens=1))
    return PullKv(replica_id=mode, request=request, attempt=0, skip_tokens=0, layout=LAYOUT)


def measure() -> tuple[list[Rate], list[Wait]]:
    rates, waits = [], []
    for kind in KINDS:
        for link, bytes_per_s in LINKS.items():
            modes = ("at once", "whole", "layered") if bytes_per_s is None else ("whole", "layered")
            seconds = dict(zip(modes, pulls_s(kind, bytes_per_s, modes), strict=True))
            if "at once" in seconds:
                rates.append(Rate(transport=kind, gb_per_s=PROMPT_TOKENS * LAYOUT.token_bytes / seconds.pop("at once") / 1e9))
            for mode, ttft_s in seconds.items():
                waits.append(Wait(transport=kind, link=link, sent=mode, ttft_s=ttft_s, share=1 - COMPUTE_S / ttft_s))
    return rates, waits


def main(as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of tables.")) -> None:
    """Measure KV transfer between two processes of this machine."""
    rates, waits = measure()
    if as_json:
        print(json.dumps(msgspec.to_builtins({"rates": rates, "waits": waits})))
        return
    size_mb = PROMPT_TOKENS * LAYOUT.token_bytes / 1e6
    _print(f"{size_mb:.0f} MB of KV as fast as it goes", ("transport", "GB/s"), [(r.transport, f"{r.gb_per_s:.2f}") for r in rates])
    rows = [(w.transport, w.link, w.sent, f"{w.ttft_s:.3f}", f"{w.share:.1%}") for w in waits]
    _print(f"with {COMPUTE_S} s of prefill", ("transport", "link", "sent", "TTFT s", "share not compute"), rows)


def _print(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
