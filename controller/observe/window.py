"""Memory of counters: raw samples, as they were pushed or read, for a bounded time."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cluster.metrics import Sample
from controller.observe.counters import Series

MAX_SERIES = 20_000  # Fifty gateways with ten models of 41 series each. At 16 bytes a sample and 360 samples each: 115 MB.
MAX_VALUE = 1e30  # Sums of squares stay finite below it, and no true count of anything is above.

Labels = tuple[tuple[str, str], ...]


class _Samples(NamedTuple):
    times_s: array[float]
    values: array[float]


class Window:
    """Samples of the last `span_s` seconds, by series. A series of which nothing came for so long is forgotten."""

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._series: dict[tuple[str, Labels], _Samples] = {}
        self.refused = 0
        """Pushed samples that were not taken."""

    def add(self, at_s: float, samples: Iterable[Sample]) -> None:
        """All taken at `at_s`, in Unix seconds."""
        for sample in samples:
            if not self.take(sample.name, sample.labels, at_s, sample.value):
                self.refused += 1

    def take(self, name: str, labels: Labels, at_s: float, value: float) -> bool:
        """One sample. False: it is no count, not newer than its series' last, or of a series beyond MAX_SERIES."""
        series = self._series.get((name, labels))
        if not 0.0 <= value <= MAX_VALUE or (series is None and len(self._series) >= MAX_SERIES):
            return False
        if series is None:
            series = self._series[name, labels] = _Samples(array("d"), array("d"))
        elif at_s <= series.times_s[-1]:
            return False
        series.times_s.append(at_s)
        series.values.append(value)
        old = bisect_left(series.times_s, at_s - self._span_s)
        del series.times_s[:old], series.values[:old]
        return True

    async def series(self, names: Sequence[str], now_s: float) -> Mapping[str, Sequence[Series]]:
        """As `found`: to be asked like a server."""
        return self.found(names, now_s)

    def found(self, names: Sequence[str], now_s: float) -> Mapping[str, Sequence[Series]]:
        """Every series of each name within the span before `now_s`, in the order of their labels."""
        for key in [key for key, samples in self._series.items() if samples.times_s[-1] < now_s - self._span_s]:
            del self._series[key]
        found: dict[str, list[Series]] = {name: [] for name in names}
        for name, labels in sorted(key for key in self._series if key[0] in found):
            found[name].append(self._within(name, labels, now_s))
        return found

    def _within(self, name: str, labels: Labels, now_s: float) -> Series:
        samples = self._series[name, labels]
        part = slice(bisect_left(samples.times_s, now_s - self._span_s), bisect_right(samples.times_s, now_s))
        return Series(name=name, labels=dict(labels), times_s=samples.times_s[part], values=samples.values[part])
