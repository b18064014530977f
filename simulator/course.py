"""Keeps how a simulation goes, in a bounded number of intervals: when there are too many, neighbours are merged."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from simulator.result import Course
from simulator.sketch import quantiles_s

MOST = 600  # Intervals: more than a plot has pixels for.

SUMS = ("arrivals", "completions", "rejections", "kept", "output_tokens")
MEANS = ("in_flight", "queued", "power_w", "kv_share", "usd_per_hour")


class CourseKeeper:
    """Told once a second."""

    def __init__(self) -> None:
        self._every = 1
        self._pending = 0
        self._sums: dict[str, list[float]] = {name: [] for name in SUMS}
        self._means: dict[str, list[float]] = {name: [] for name in MEANS}
        self._replicas: dict[str, list[float]] = {}
        self._sketches: list[NDArray[np.int64]] = []
        self._last: dict[str, float] = dict.fromkeys(SUMS, 0.0)
        self._last_sketch: NDArray[np.int64] | None = None
        self._length = 0

    def note(
        self, totals: Mapping[str, float], levels: Mapping[str, float], replicas: Mapping[str, int], sketches: NDArray[np.int64]
    ) -> None:
        """totals: SUMS, as counted since the start. levels: MEANS, as they are now. sketches: TTFT and TPOT, since the start."""
        fresh = self._pending == 0
        if fresh:
            self._open()
        for name in SUMS:
            self._sums[name][-1] += totals[name] - self._last[name]
            self._last[name] = totals[name]
        for name in MEANS:
            self._means[name][-1] += levels[name] / self._every
        for name in replicas.keys() - self._replicas.keys():
            self._replicas[name] = [0.0] * self._length
        for name, values in self._replicas.items():
            values[-1] += replicas.get(name, 0) / self._every
        self._pending += 1
        if self._pending == self._every:
            self._close(sketches)

    def course(self) -> Course:
        """Whole intervals alone."""
        whole = self._length - (self._pending > 0)
        p90 = [[None if (found := quantiles_s(each, (0.9,))) is None else found[0] for each in pair] for pair in self._sketches]
        return Course(
            every_s=float(self._every),
            **{name: values[:whole] for name, values in (*self._sums.items(), *self._means.items())},
            ttft_p90_s=[pair[0] for pair in p90],
            tpot_p90_s=[pair[1] for pair in p90],
            replicas={name: values[:whole] for name, values in sorted(self._replicas.items())},
        )

    def _open(self) -> None:
        for values in (*self._sums.values(), *self._means.values(), *self._replicas.values()):
            values.append(0.0)
        self._length += 1

    def _close(self, sketches: NDArray[np.int64]) -> None:
        before = np.zeros_like(sketches) if self._last_sketch is None else self._last_sketch
        self._sketches.append((sketches - before).astype(np.int32))
        self._last_sketch = sketches.copy()
        self._pending = 0
        if self._length == MOST:
            self._merge()

    def _merge(self) -> None:
        for values in self._sums.values():
            values[:] = [values[i] + values[i + 1] for i in range(0, MOST, 2)]
        for values in (*self._means.values(), *self._replicas.values()):
            values[:] = [(values[i] + values[i + 1]) / 2 for i in range(0, MOST, 2)]
        self._sketches = [self._sketches[i] + self._sketches[i + 1] for i in range(0, MOST, 2)]
        self._length //= 2
        self._every *= 2
