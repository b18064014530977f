"""Telemetry at hand: read in the background, so that no pass waits for whom it is read from."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from controller.observe.counters import Series

log = logging.getLogger(__name__)

PERIOD_S = 1.0  # The width of the controller's buckets.
READ_S = 15.0  # A source that takes longer is asked anew. It bounds itself; this is for what it did not think of.


class Source(Protocol):
    """Where raw samples come from."""

    async def series(self, names: Sequence[str], now_s: float) -> Mapping[str, Sequence[Series]]: ...


class TelemetryFeed:
    """The last good answer of a source."""

    def __init__(
        self,
        source: Source,
        names: Sequence[str],
        clock: Callable[[], float],
        *,
        period_s: float = PERIOD_S,
        read_s: float = READ_S,
    ) -> None:
        """clock: Unix seconds, that never step back."""
        self.errors = 0
        """Reads that failed."""
        self._source, self._names, self._clock = source, tuple(names), clock
        self._period_s, self._read_s = period_s, read_s
        self._latest: Mapping[str, Sequence[Series]] = {}
        self._read_at_s = -math.inf
        self._failing = False

    def latest(self) -> Mapping[str, Sequence[Series]]:
        """Series by name, as last read; nothing before the first read. How old they are, their own times say."""
        return self._latest

    @property
    def age_s(self) -> float:
        """Since the last good read; infinite before the first."""
        return self._clock() - self._read_at_s

    async def run(self) -> None:
        """For ever. A read that takes longer than the period delays the next; none is made up for."""
        while True:
            began_s = self._clock()
            await self.read()
            await asyncio.sleep(max(0.0, began_s + self._period_s - self._clock()))

    async def read(self) -> None:
        """Once. What fails leaves the last good answer in force; the log says when that begins and when it ends."""
        now_s = self._clock()
        try:
            self._latest = await asyncio.wait_for(self._source.series(self._names, now_s), self._read_s)
        except Exception as error:
            self.errors += 1
            if not self._failing:
                log.warning("telemetry is not read any more: %s", str(error) or repr(error))
            self._failing = True
        else:
            if self._failing:
                log.warning("telemetry is read again, after %.0f s", now_s - self._read_at_s)
            self._read_at_s, self._failing = now_s, False
