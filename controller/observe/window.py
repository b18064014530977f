"""The controller's own memory of counters: raw samples, as they were pushed, for a bounded time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from cluster.metrics import Sample
from controller.observe.counters import Series

MAX_SERIES = 20_000  # A hundred gateways with ten models: 16 buckets of four histograms, and some counters, each.


class Window:
    """Samples of the last `span_s` seconds, by series. A series of which nothing came for so long is forgotten."""

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._samples: dict[tuple[str, tuple[tuple[str, str], ...]], deque[tuple[float, float]]] = {}
        self.refused = 0
        """Samples of series beyond MAX_SERIES, and samples older than their series' last."""

    def add(self, at_s: float, samples: Iterable[Sample]) -> None:
        """All taken at `at_s`, in Unix seconds."""
        for sample in samples:
            key = (sample.name, sample.labels)
            series = self._samples.get(key)
            if series is None and len(self._samples) < MAX_SERIES:
                series = self._samples[key] = deque()
            if series is None or (series and series[-1][0] >= at_s):
                self.refused += 1
                continue
            series.append((at_s, sample.value))
            while series[0][0] < at_s - self._span_s:
                series.popleft()

    async def series(self, names: Sequence[str], now_s: float) -> Mapping[str, Sequence[Series]]:
        """Every series of each name within the span before `now_s`, in the order of their labels."""
        for key in [key for key, samples in self._samples.items() if samples[-1][0] < now_s - self._span_s]:
            del self._samples[key]
        found: dict[str, list[Series]] = {name: [] for name in names}
        for name, labels in sorted(self._samples):
            if name in found:
                within = [(at_s, value) for at_s, value in self._samples[name, labels] if now_s - self._span_s <= at_s <= now_s]
                times_s, values = zip(*within, strict=True) if within else ((), ())
                found[name].append(Series(name=name, labels=dict(labels), times_s=times_s, values=values))
        return found
