"""Rates and quantiles from raw samples of counters, wherever the samples come from.

Prometheus is asked for raw samples too, and never for a rate: then the same samples give the same figures as the controller's own
window does, to the last bit. A counter that falls has begun anew with its process (as PromQL's `increase` takes it); between two
samples it is taken to have risen evenly.
"""

from __future__ import annotations

import itertools
import math
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np

from cluster.metrics import (
    ARRIVALS,
    ARRIVED_TOKENS,
    ARRIVED_TOKENS_SQUARED,
    CACHED_TOKENS,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    REQUESTS,
)
from cluster.snapshot import Demand, Latency

ANSWERS = 100  # Their mean length is within a tenth or two of the true one, and so many have ended soon after the mix has turned.
_DEMAND = (ARRIVALS, ARRIVED_TOKENS, ARRIVED_TOKENS_SQUARED, PROMPT_TOKENS, CACHED_TOKENS, OUTPUT_TOKENS, REQUESTS)
LATE_S = 3.0  # A series whose last sample is so much older than the newest one's has ended, and adds nothing after it.


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """Samples of one counter of one process, oldest first."""

    name: str
    labels: Mapping[str, str] = {}
    times_s: Sequence[float]
    values: Sequence[float]


Telemetry = Mapping[str, Sequence[Series]]


def covered_until_s(series: Iterable[Series]) -> float:
    """Unix time up to which all series that go on are known; -inf where there is none."""
    last = [one.times_s[-1] for one in series if one.times_s]
    newest = max(last, default=-math.inf)
    return min((time_s for time_s in last if time_s > newest - LATE_S), default=-math.inf)


def risen(series: Iterable[Series], edges_s: np.ndarray) -> np.ndarray:
    """By how much the counters rose between neighbouring edges, summed. float64 [edges - 1]."""
    total = np.zeros(len(edges_s) - 1)
    for one in series:
        times_s, whole = _whole(one, edges_s[0], edges_s[-1])
        if len(times_s) > 1:
            total += np.diff(np.interp(edges_s, times_s, whole))
    return total


def rise(series: Iterable[Series], start_s: float, end_s: float) -> float:
    """By how much the counters rose in all between two times."""
    total = 0.0
    for one in series:
        times_s, whole = _whole(one, start_s, end_s)
        if len(times_s) > 1:
            total += _at(end_s, times_s, whole) - _at(start_s, times_s, whole)
    return total


def _whole(one: Series, start_s: float, end_s: float) -> tuple[Sequence[float], Sequence[float]]:
    """The samples that tell of a span, as if the counter had never begun anew."""
    first, end = max(0, bisect_right(one.times_s, start_s) - 1), bisect_left(one.times_s, end_s) + 1
    values = one.values[first:end]
    if any(map(operator.gt, values, values[1:])):
        steps = (later - earlier if later >= earlier else later for earlier, later in itertools.pairwise(values))
        values = tuple(itertools.accumulate(steps, initial=0.0))
    return one.times_s[first:end], values


def _at(time_s: float, times_s: Sequence[float], whole: Sequence[float]) -> float:
    """Between two samples evenly; before the first and after the last as there."""
    after = bisect_right(times_s, time_s)
    if after == 0 or after == len(times_s):
        return whole[min(after, len(whole) - 1)]
    share = (time_s - times_s[after - 1]) / (times_s[after] - times_s[after - 1])
    return whole[after - 1] + share * (whole[after] - whole[after - 1])


def demand(series: Telemetry, edges_s: np.ndarray) -> tuple[Demand, ...]:
    """One bucket between each two edges.

    How long answers are and how much of prompts is cached is known only of requests that have ended: what arrives in a bucket is
    taken to be like those that ended up to it (see `_like`).
    """
    rose = {name: risen(series.get(name, ()), edges_s) for name in _DEMAND}
    like = _like(rose[REQUESTS])
    output_tokens = rose[ARRIVALS] * _ratio(rose[OUTPUT_TOKENS], rose[REQUESTS], like)
    cached_share = np.minimum(_ratio(rose[CACHED_TOKENS], rose[PROMPT_TOKENS], like), 1.0)
    computed = 1.0 - cached_share
    columns = {
        "requests": np.round(rose[ARRIVALS], 3),
        "prompt_tokens": np.round(rose[ARRIVED_TOKENS] * computed, 1),
        "prompt_tokens_squared": np.round(rose[ARRIVED_TOKENS_SQUARED] * computed * computed, 1),
        "cached_tokens": np.round(rose[ARRIVED_TOKENS] * cached_share, 1),
        "output_tokens": np.round(output_tokens, 1),
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return tuple(Demand(**dict(zip(columns, row, strict=True))) for row in rows)


def _like(ended: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each bucket, the first bucket and the one after the last of those whose ended requests tell of it.

    The last `ANSWERS` up to the bucket, or the first ones of all where it has fewer before it. Both int64 [buckets].
    """
    total = np.concatenate(([0.0], np.cumsum(ended)))
    ends = np.arange(1, len(total))
    ends = np.minimum(np.maximum(ends, np.searchsorted(total, ANSWERS)), len(ended))
    starts = np.searchsorted(total, total[ends] - ANSWERS, side="right") - 1
    return np.maximum(starts, 0), ends


def _ratio(of: np.ndarray, to: np.ndarray, spans: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """One sum over another, for each span; 0 where the second is. float64 [spans]."""
    above, below = (np.concatenate(([0.0], np.cumsum(rose))) for rose in (of, to))
    starts, ends = spans
    whole = below[ends] - below[starts]
    return np.divide(above[ends] - above[starts], whole, out=np.zeros(len(ends)), where=whole > 0.0)


def latency(buckets: Mapping[float, Sequence[Series]], start_s: float, end_s: float) -> Latency | None:
    """Quantiles of what a histogram counted between two times; None where it counted nothing.

    buckets: series of each cumulative bucket by its upper bound, infinity among them. Within a bucket values are taken to lie
    evenly, as PromQL's `histogram_quantile` does; beyond the last finite bound they are taken for that bound.
    """
    bounds = sorted(buckets)
    counts = list(itertools.accumulate((rise(buckets[bound], start_s, end_s) for bound in bounds), max))
    if not counts or counts[-1] <= 0.0:
        return None
    p50_s, p90_s, p99_s = (_quantile(share, bounds, counts) for share in (0.5, 0.9, 0.99))
    return Latency(p50_s=p50_s, p90_s=p90_s, p99_s=p99_s)


def share_within(buckets: Mapping[float, Sequence[Series]], bound_s: float, start_s: float, end_s: float) -> float | None:
    """Share of what a histogram counted that was at most a bound, evenly within its bucket; None where it counted nothing."""
    bounds = sorted(buckets)
    counts = [rise(buckets[bound], start_s, end_s) for bound in bounds]
    if not counts or counts[-1] <= 0.0:
        return None
    finite = [(bound, count) for bound, count in zip(bounds, counts, strict=True) if math.isfinite(bound)]
    known = np.interp(bound_s, [0.0, *(bound for bound, _ in finite)], [0.0, *(count for _, count in finite)])
    return round(float(known) / counts[-1], 4)


def _quantile(share: float, bounds: Sequence[float], counts: Sequence[float]) -> float:
    rank = share * counts[-1]
    index = bisect_left(counts, rank)
    if math.isinf(bounds[index]):
        return bounds[index - 1] if index else math.inf
    low_bound, low_count = (bounds[index - 1], counts[index - 1]) if index else (0.0, 0.0)
    inside = counts[index] - low_count
    return round(low_bound + (bounds[index] - low_bound) * (rank - low_count) / inside, 6)
