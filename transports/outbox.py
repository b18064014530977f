"""Queues between those who send without waiting and the coroutine that writes at the network's pace."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from transports import wire
from transports.messages import MAX_MESSAGE_BYTES, KvChunk, KvDone, KvFailed

STREAM_QUEUE_BYTES = MAX_MESSAGE_BYTES  # Room for the largest message; tokens would need minutes to fill it.
STREAM_BATCH_BYTES = 2**18  # Enough to make a gRPC message's cost vanish, and too little to delay what follows.
THROTTLE_BURST_S = 0.02  # What an idle link may catch up on: more than a sleep's inaccuracy, or the rate would not be reached.


class StreamQueue:
    """Encoded messages of one stream. Loop thread only."""

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque()
        self._queued_bytes = 0
        self._ready = asyncio.Event()

    def push(self, message: bytes) -> bool:
        """False, and the message dropped, when the queue is at STREAM_QUEUE_BYTES."""
        if self._queued_bytes + len(message) + 8 > STREAM_QUEUE_BYTES:
            return False
        self._waiting.append(message)
        self._queued_bytes += len(message)
        self._ready.set()
        return True

    async def batch(self) -> bytes:
        """What waits, as much as makes a batch; waits for a message where there is none."""
        await self._ready.wait()
        taken = [self._waiting.popleft()]
        size = len(taken[0])
        while self._waiting and size + len(self._waiting[0]) <= STREAM_BATCH_BYTES:
            taken.append(self._waiting.popleft())
            size += len(taken[-1])
        self._queued_bytes -= size
        if not self._waiting:
            self._ready.clear()
        return wire.batch(taken)


class KvQueue:
    """A KvOutbox: KV of one pull between the engine's thread and the loop.

    `put` never waits, for it would hold up the engine's whole batch. The queue holds at most `bound_bytes`, the size of the
    KV that was asked for; an engine that puts more ends the pull with a failure.
    """

    def __init__(self, bound_bytes: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._ready = asyncio.Event()
        self._bound_bytes = bound_bytes
        self._waiting: deque[tuple[KvChunk, np.ndarray]] = deque()
        self._queued_bytes = 0
        self._last: KvDone | KvFailed | None = None
        self._cancelled = False
        self._on_cancel: list[Callable[[], None]] = []

    def put(self, chunk: KvChunk, kv: np.ndarray) -> None:
        with self._lock:
            if self._last is not None or self._cancelled:
                return
            if self._queued_bytes + kv.nbytes > self._bound_bytes:
                self._last = KvFailed(message=f"more KV than the {self._bound_bytes} bytes asked for", retry=True)
            else:
                self._waiting.append((chunk, kv))
                self._queued_bytes += kv.nbytes
        self._wake()

    def end(self, last: KvDone | KvFailed) -> None:
        with self._lock:
            if self._last is None:
                self._last = last
        self._wake()

    def on_cancel(self, call: Callable[[], None]) -> None:
        """Runs `call` on the loop's thread; at once and here where the receiver is already gone."""
        with self._lock:
            gone = self._cancelled
            if not gone:
                self._on_cancel.append(call)
        if gone:
            call()

    def cancel(self) -> None:
        """The receiver is gone. Nothing happens where the last word has been said."""
        with self._lock:
            if self._last is not None or self._cancelled:
                return
            self._cancelled = True
            self._waiting.clear()
            calls, self._on_cancel = self._on_cancel, []
        for call in calls:
            call()

    async def take(self, timeout_s: float) -> tuple[KvChunk, np.ndarray] | KvDone | KvFailed | None:
        """The next chunk or, after all of them, the last word. None when neither came in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        with self._lock:
            if self._waiting:
                chunk, kv = self._waiting.popleft()
                self._queued_bytes -= kv.nbytes
                return chunk, kv
            if self._last is None:
                self._ready.clear()
            return self._last

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # The loop has closed, and the pull with it.
            self._loop.call_soon_threadsafe(self._ready.set)


class Throttle:
    """A token bucket of `bytes_per_s` that all pulls of a sender share; None is as fast as it goes."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0

    def reserve_s(self, size: int) -> float:
        """Seconds until the link will have carried `size` more bytes."""
        if self._bytes_per_s is None:
            return 0.0
        now_s = time.monotonic()
        self._free_s = max(now_s - THROTTLE_BURST_S, self._free_s) + size / self._bytes_per_s
        return self._free_s - now_s
