"""Simulated time: what happens next, and chance that is the same for the same seed."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from random import Random

import xxhash


class Timeline:
    """Events by (time, order of being added). Time only passes in `run_next`."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._added = 0

    @property
    def next_s(self) -> float:
        """When the next event is due; infinite without one."""
        return self._due[0][0] if self._due else math.inf

    def at(self, time_s: float, event: Callable[[], None]) -> None:
        """Have it run at a time, which is not before now."""
        assert time_s >= self.now_s, f"an event at {time_s} s, before {self.now_s} s"
        heapq.heappush(self._due, (time_s, self._added, event))
        self._added += 1

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        self.at(self.now_s + seconds, event)

    def run_next(self) -> None:
        """The next event, at its time."""
        time_s, _, event = heapq.heappop(self._due)
        assert time_s >= self.now_s, f"an event at {time_s} s, after {self.now_s} s"
        self.now_s = time_s
        event()


def stream(seed: int, concern: str) -> Random:
    """Chance of one concern: drawing more of it changes nothing of the others'."""
    return Random(xxhash.xxh3_64_intdigest(concern.encode(), seed & (2**64 - 1)))
