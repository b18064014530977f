"""Who calls an emulated engine when its step is over: one thread for all engines of a process, or a test's own hand.

An engine without work has nothing in the queue and costs nothing.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

Clock = Callable[[], float]

log = logging.getLogger(__name__)


class Driver(Protocol):
    clock: Clock
    """Seconds that only rise."""

    def call_at(self, at_s: float, call: Callable[[], None]) -> None:
        """Have `call` run once the clock shows `at_s`, on the driver's thread; of equal times the first asked runs first."""


class StepDriver:
    """A thread with a heap of due times. Starts with the first call and ends with `close`."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._changed = threading.Condition(threading.Lock())
        self._thread: threading.Thread | None = None
        self._closed = False

    def call_at(self, at_s: float, call: Callable[[], None]) -> None:
        with self._changed:
            entry = (at_s, next(self._order), call)
            heapq.heappush(self._due, entry)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="emulated-engines", daemon=True)
                self._thread.start()
            if self._due[0] is entry:
                self._changed.notify()

    def close(self) -> None:
        """Ends the thread; what is still due does not run. Not from a call that it runs."""
        with self._changed:
            self._closed = True
            self._due.clear()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while (call := self._next()) is not None:
            try:
                call()
            except Exception:
                # One engine's fault must not stop the others' steps.
                log.exception("an emulated engine's step failed")

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._closed:
                wait_s = self._due[0][0] - self.clock() if self._due else None
                if wait_s is not None and wait_s <= 0.0:
                    return heapq.heappop(self._due)[2]
                self._changed.wait(wait_s)
        return None


class ManualDriver:
    """Time passes, and calls run, only inside `advance`. For tests and for runs faster than real time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def clock(self) -> float:
        return self.now_s

    def call_at(self, at_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._due, (at_s, next(self._order), call))

    def advance(self, seconds: float = 0.0) -> None:
        """Run all that is due within so many seconds, each at its time."""
        end_s = self.now_s + seconds
        while self._due and self._due[0][0] <= end_s:
            at_s, _, call = heapq.heappop(self._due)
            self.now_s = max(self.now_s, at_s)
            call()
        self.now_s = end_s

    def drain(self) -> None:
        """Run until nothing is due any more."""
        while self._due:
            self.advance(max(0.0, self._due[0][0] - self.now_s))
