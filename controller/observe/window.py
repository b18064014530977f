"""The controller's own memory of counters: raw samples, as they were pushed, for a bounded time."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cluster.metrics import Sample
from controller.observe.counters import Series

MAX_SERIES = 20_000  # A hundred gateways with ten models: 16 buckets of four histograms, and some counters, each.

Labels = tuple[tuple[str, str], ...]


class Window:
    """Samples of the last `span_s` seconds, by series. A series of which nothing came for so long is forgotten."""

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._samples: dict[tuple[str, Labels], _Samples] = {}
        self._by_name: dict[str, list[tuple[Labels, _Samples]]] = {}
        """The same, sorted; empty where a series has come or gone since."""
        self.refused = 0
        """Samples of series beyond MAX_SERIES, and samples older than their series' last."""

    def add(self, at_s: float, samples: Iterable[Sample]) -> None:
        """All taken at `at_s`, in Unix seconds."""
        for sample in samples:
            key = (sample.name, sample.labels)
            known = self._samples.get(key)
            if known is None and len(self._samples) < MAX_SERIES:
                known = self._samples[key] = _Samples([], [])
                self._by_name = {}
            if known is None or (known.times_s and known.times_s[-1] >= at_s):
                self.refused += 1
                continue
            known.times_s.append(at_s)
            known.values.append(sample.value)
            known.forget(at_s - self._span_s)

    async def series(self, names: Sequence[str], now_s: float) -> Mapping[str, Sequence[Series]]:
        """Every series of each name within the span before `now_s`, in the order of their labels."""
        start_s = now_s - self._span_s
        for key in [key for key, known in self._samples.items() if known.times_s[-1] < start_s]:
            del self._samples[key]
            self._by_name = {}
        if not self._by_name:
            for name, labels in sorted(self._samples):
                self._by_name.setdefault(name, []).append((labels, self._samples[name, labels]))
        return {
            name: [known.within(name, labels, start_s, now_s) for labels, known in self._by_name.get(name, ())] for name in names
        }


class _Samples(NamedTuple):
    """Of one series, oldest first."""

    times_s: list[float]
    values: list[float]

    def forget(self, until_s: float) -> None:
        if self.times_s[0] < until_s:
            old = bisect_left(self.times_s, until_s)
            del self.times_s[:old], self.values[:old]

    def within(self, name: str, labels: Labels, start_s: float, end_s: float) -> Series:
        first, end = bisect_left(self.times_s, start_s), bisect_right(self.times_s, end_s)
        times_s, values = tuple(self.times_s[first:end]), tuple(self.values[first:end])
        return Series(name=name, labels=dict(labels), times_s=times_s, values=values)
