"""How fast KV moves between two processes, and what of it a request waits for.

`gb_per_s` is a prompt's KV pulled as fast as it goes. `ttft_s` is a pull while the torch engine computes the prompt in the other
process, its KV sent whole after the compute or layered, as each layer is done; `share` is the part of it that is not compute.

    python -m benchmarks.kv_transfer [--json]
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import statistics
import tempfile
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from benchmarks.random_model import save_random
from cluster.handoff import RequestState
from cluster.kv import KvLayout, blocks_for
from cluster.request import Request, SamplingParams
from transports.grpc import GrpcTransport
from transports.messages import KvChunk, KvDone, KvFailed, PullKv
from transports.shared_memory import SharedMemoryTransport
from transports.transport import Credential, KvOutbox
from workers.engines.torch_engine.engine import TorchEngine
from workers.prefill import PrefillRole

KINDS = {"grpc": GrpcTransport, "shared_memory": SharedMemoryTransport}
LINKS: dict[str, float | None] = {"free": None, "200 MB/s": 200e6}
CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
)
LAYOUT = KvLayout(layers=12, kv_heads=8, head_dim=64, dtype="float32", block_tokens=16)
PROMPT_TOKENS = 1024
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


class WholeOutbox:
    """Keeps what is put until the last word."""

    def __init__(self, outbox: KvOutbox) -> None:
        self._outbox = outbox
        self._kept: list[tuple[KvChunk, np.ndarray]] = []
        self.on_cancel = outbox.on_cancel

    def put(self, chunk: KvChunk, kv: np.ndarray) -> None:
        self._kept.append((chunk, kv))

    def end(self, last: KvDone | KvFailed) -> None:
        for chunk, kv in self._kept:
            self._outbox.put(chunk, kv)
        self._outbox.end(last)


class Prefill:
    """A prefill worker; the replica asked for says how it sends: `at once` without computing, `whole` or `layered`."""

    def __init__(self, model: Path) -> None:
        blocks = 2 * blocks_for(PROMPT_TOKENS, LAYOUT.block_tokens)
        self.engine = TorchEngine(path=str(model), model="m", kv_blocks=blocks, step_budget_tokens=PROMPT_TOKENS)
        self.engine.start(lambda output: None)
        assert self.engine.layout == LAYOUT, self.engine.layout
        self._role = PrefillRole(self.engine)
        self._noise = np.random.default_rng(0).standard_normal((2, PROMPT_TOKENS, LAYOUT.kv_heads, LAYOUT.head_dim), np.float32)

    def pulled(self, pull: PullKv, outbox: KvOutbox) -> None:
        match pull.replica_id:
            case "at once":
                threading.Thread(target=self._send, args=(pull, outbox), daemon=True).start()
            case "whole":
                self._role.pulled(pull, WholeOutbox(outbox))
            case "layered":
                self._role.pulled(pull, outbox)

    def _send(self, pull: PullKv, outbox: KvOutbox) -> None:
        for layer in range(LAYOUT.layers):
            outbox.put(KvChunk(layer=layer, first_token=0, tokens=PROMPT_TOKENS), self._noise)
        state = RequestState(request=pull.request, generated=(0,))
        outbox.end(KvDone(state=state, queue_s=0.0, prefill_s=0.0, cached_tokens=0))


def serve(kind: str, bytes_per_s: float | None, model: Path, pipe: Connection) -> None:
    """The prefill process; ends when the other end of `pipe` says so."""

    async def run() -> None:
        service = Prefill(model)
        listener = await KINDS[kind](CREDENTIAL, kv_bytes_per_s=bytes_per_s).serve(service, "127.0.0.1", 0)
        pipe.send(listener.endpoint)
        await asyncio.to_thread(pipe.recv)
        await listener.close(0)
        service.engine.stop()

    asyncio.run(run())


def pulls(kind: str, bytes_per_s: float | None, modes: tuple[str, ...], model: Path) -> list[tuple[float, float]]:
    """Median seconds of a pull in each mode, and of the compute in it, from a prefill process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(kind, bytes_per_s, model, theirs))
    process.start()
    try:
        return asyncio.run(_pulls(kind, ours.recv(), modes))
    finally:
        ours.send(None)
        process.join()


async def _pulls(kind: str, endpoint: str, modes: tuple[str, ...]) -> list[tuple[float, float]]:
    transport, rng = KINDS[kind](CREDENTIAL), np.random.default_rng(1)
    pool = np.zeros((LAYOUT.layers, 2, PROMPT_TOKENS, LAYOUT.kv_heads, LAYOUT.head_dim), np.float32)
    loop = asyncio.get_running_loop()

    def write(chunk: KvChunk, kv: np.ndarray) -> None:
        pool[chunk.layer, :, chunk.first_token : chunk.first_token + chunk.tokens] = kv

    async def once(mode: str) -> tuple[float, float]:
        prompt = tuple(rng.integers(0, CONFIG.vocab_size, PROMPT_TOKENS).tolist())  # Never cached.
        request = Request(request_id=str(loop.time()), model="m", prompt=prompt, sampling=SamplingParams(max_tokens=1))
        pull = PullKv(replica_id=mode, request=request, attempt=0, skip_tokens=0, layout=LAYOUT)
        started_s = loop.time()
        done = await transport.pull(endpoint, pull, write)
        return loop.time() - started_s, done.prefill_s

    for mode in modes:
        await once(mode)
    taken = {mode: [await once(mode) for _ in range(REPEATS)] for mode in modes}
    return [
        (statistics.median(ttft for ttft, _ in taken[mode]), statistics.median(own for _, own in taken[mode])) for mode in modes
    ]


def measure() -> tuple[list[Rate], list[Wait]]:
    rates, waits = [], []
    with tempfile.TemporaryDirectory() as folder:
        model = save_random(CONFIG, Path(folder))
        for kind in KINDS:
            for link, bytes_per_s in LINKS.items():
                modes = ("at once", "whole", "layered") if bytes_per_s is None else ("whole", "layered")
                for mode, (ttft_s, compute_s) in zip(modes, pulls(kind, bytes_per_s, modes, model), strict=True):
                    if mode == "at once":
                        rates.append(Rate(transport=kind, gb_per_s=PROMPT_TOKENS * LAYOUT.token_bytes / ttft_s / 1e9))
                    else:
                        waits.append(Wait(transport=kind, link=link, sent=mode, ttft_s=ttft_s, share=1 - compute_s / ttft_s))
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
    _print(
        f"{PROMPT_TOKENS} tokens computed by the torch engine", ("transport", "link", "sent", "TTFT s", "share not compute"), rows
    )


def _print(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
