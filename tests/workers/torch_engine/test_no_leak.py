"""Ten thousand requests through the torch engine leave nothing behind."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import psutil

from cluster.request import Request, SamplingParams
from workers.engines.engine import StepOutput, Submission
from workers.engines.torch_engine.engine import TorchEngine

REQUESTS = 10_000
IN_FLIGHT = 200
SETTLED = 2_000
"""Requests after which caches, allocator pools and the prefix index have their full size."""
MAX_GROWTH_BYTES = 24 * 2**20  # 3 KB a request would show; a leaked block or sequence is more.


class Feeder:
    """Keeps `IN_FLIGHT` requests in an engine; every seventh is aborted half way."""

    def __init__(self) -> None:
        self.engine: TorchEngine | None = None
        self.sent = 0
        self.ended = 0
        self.goal = 0
        self.reached = threading.Event()

    def run_to(self, goal: int) -> None:
        first = self.sent == 0
        self.goal = goal
        self.reached.clear()
        for _ in range(IN_FLIGHT if first else IN_FLIGHT - (self.sent - self.ended)):
            self.send()
        assert self.reached.wait(100), f"{self.ended} of {goal} requests ended"

    def send(self) -> None:
        if self.sent >= self.goal:
            return
        number = self.sent
        self.sent += 1
        prompt = tuple(3 + (number * 31 + place * 7) % 250 for place in range(8 + number % 30))
        sampling = SamplingParams(max_tokens=1 + number % 4, temperature=float(number % 2), seed=number, ignore_eos=True)
        assert self.engine is not None
        self.engine.submit(Submission(request=Request(request_id=str(number), model="m", prompt=prompt, sampling=sampling)))
        if number % 7 == 0:
            self.engine.abort(str(number))

    def take(self, output: StepOutput) -> None:
        finished = sum(token.finish is not None for token in output.tokens)
        self.ended += finished
        for _ in range(finished):
            self.send()
        if self.ended >= self.goal:
            self.reached.set()


def test_ten_thousand_requests_leak_no_block_file_thread_or_memory(llama: Path) -> None:
    feeder = Feeder()
    engine = TorchEngine(path=str(llama), model="m", kv_blocks=600, max_running=64, step_budget_tokens=1024)
    feeder.engine = engine
    process = psutil.Process()
    engine.start(feeder.take)
    try:
        feeder.run_to(SETTLED)
        gc.collect()
        files, threads, rss = len(os.listdir("/proc/self/fd")), threading.active_count(), process.memory_info().rss
        feeder.run_to(REQUESTS)
        gc.collect()
        load = engine.load()
        assert (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)
        assert len(os.listdir("/proc/self/fd")) <= files  # Others may close what they had open.
        assert threading.active_count() <= threads
        assert process.memory_info().rss - rss < MAX_GROWTH_BYTES
    finally:
        engine.stop()
