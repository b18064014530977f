"""Rates and quantiles from raw samples of counters, wherever the samples come from.

Prometheus is asked for raw samples too, and never for a rate: then the same samples give the same figures as the controller's own
window does, to the last bit. A counter that falls has begun anew with its process (as PromQL's `increase` takes it); between two
samples it is taken to have risen evenly.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np

from cluster.snapshot import Demand, Latency

LATE_S = 3.0  # A series whose last sample is so much older than the newest one's has ended, and adds nothing after it.


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """Samples of one counter of one process, oldest first."""

    name: str
    labels: Mapping[str, str] = {}
    times_s: tuple[float, ...]
    values: tuple[float, ...]


def covered_until_s(series: Iterable[Series]) -> float:
    """Unix time up to which all series that go on are known; -inf where there is none."""
    last = [one.times_s[-1] for one in series if one.times_s]
    newest = max(last, default=-math.inf)
    return min((time_s for time_s in last if time_s > newest - LATE_S), default=-math.inf)


def risen(series: Iterable[Series], edges_s: np.ndarray) -> np.ndarray:
    """By how much the counters rose between neighbouring edges, summed. float64 [edges - 1]."""
    total = np.zeros(len(edges_s) - 1)
    for one in series:
        # From the last sample at or before the first edge to the first one at or after the last.
        part = slice(max(0, bisect_right(one.times_s, edges_s[0]) - 1), bisect_left(one.times_s, edges_s[-1]) + 1)
        times_s = one.times_s[part]
        if len(times_s) > 1:
            values = np.array(one.values[part])
            steps = np.diff(values)
            whole = np.concatenate(([0.0], np.cumsum(np.where(steps >= 0.0, steps, values[1:]))))
            total += np.diff(np.interp(edges_s, times_s, whole))
    return total


def demand(
    arrivals: Sequence[Series],
    prompt_tokens: Sequence[Series],
    prompt_tokens_squared: Sequence[Series],
    edges_s: np.ndarray,
    cached_share: float,
    output_tokens: float,
) -> tuple[Demand, ...]:
    """One bucket between each two edges.

    cached_share: of prompt tokens, found in caches of late. output_tokens: a request's mean of late. Both are known only of
    requests that have ended, and are taken for those that arrive.
    """
    requests, tokens, squares = (risen(series, edges_s) for series in (arrivals, prompt_tokens, prompt_tokens_squared))
    computed = 1.0 - cached_share
    return tuple(
        Demand(
            requests=round(float(count), 3),
            prompt_tokens=round(float(total) * computed, 1),
            prompt_tokens_squared=round(float(square) * computed * computed, 1),
            cached_tokens=round(float(total) * cached_share, 1),
            output_tokens=round(float(count) * output_tokens, 1),
        )
        for count, total, square in zip(requests, tokens, squares, strict=True)
    )


def latency(buckets: Mapping[float, Sequence[Series]], start_s: float, end_s: float) -> Latency | None:
    """Quantiles of what a histogram counted between two times; None where it counted nothing.

    buckets: series of each cumulative bucket by its upper bound, infinity among them. Within a bucket values are taken to lie
    evenly, as PromQL's `histogram_quantile` does; beyond the last finite bound they are taken for that bound.
    """
    bounds = sorted(buckets)
    edges_s = np.array([start_s, end_s])
    counts = np.maximum.accumulate([risen(buckets[bound], edges_s)[0] for bound in bounds]) if bounds else np.zeros(1)
    if counts[-1] <= 0.0:
        return None
    p50_s, p90_s, p99_s = (_quantile(share, bounds, counts) for share in (0.5, 0.9, 0.99))
    return Latency(p50_s=p50_s, p90_s=p90_s, p99_s=p99_s)


def share_within(buckets: Mapping[float, Sequence[Series]], bound_s: float, start_s: float, end_s: float) -> float | None:
    """Share of what a histogram counted that was at most a bound, evenly within its bucket; None where it counted nothing."""
    bounds = sorted(buckets)
    edges_s = np.array([start_s, end_s])
    counts = [float(risen(buckets[bound], edges_s)[0]) for bound in bounds]
    if not counts or counts[-1] <= 0.0:
        return None
    finite = [(bound, count) for bound, count in zip(bounds, counts, strict=True) if math.isfinite(bound)]
    known = np.interp(bound_s, [0.0, *(bound for bound, _ in finite)], [0.0, *(count for _, count in finite)])
    return round(float(known) / counts[-1], 4)


def _quantile(share: float, bounds: Sequence[float], counts: np.ndarray) -> float:
    rank = share * counts[-1]
    index = int(np.searchsorted(counts, rank))
    if math.isinf(bounds[index]):
        return bounds[index - 1] if index else math.inf
    low_bound, low_count = (bounds[index - 1], counts[index - 1]) if index else (0.0, 0.0)
    inside = counts[index] - low_count
    return round(float(low_bound + (bounds[index] - low_bound) * (rank - low_count) / inside), 6)
