"""What arrives, as an estimate with its uncertainty: from the counts of a workload's buckets to a rate that is believed.

Arrivals are counts, so a window of `n` of them has a standard deviation of sqrt(D n), D being their index of dispersion (1 for
Poisson; Cox and Lewis, "The Statistical Analysis of Series of Events", 1966). A rise is believed as far as the lower bound of some
window shows it: a big one after seconds, a small one after minutes. A fall is believed as far as every upper bound does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import msgspec

from cluster.ranges import at_least, positive, share
from cluster.snapshot import Demand, Workload


class Flow(msgspec.Struct, frozen=True, kw_only=True):
    """A steady stream of requests of one kind. Lengths are means per request, in tokens."""

    rate_rps: float
    prompt_tokens: float
    """To compute: not found in a cache."""
    prompt_tokens_sd: float
    context_tokens: float
    """Cached tokens included."""
    output_tokens: float
    dispersion: float = 1.0
    """Variance over mean of arrival counts, >= 1."""

    def at(self, rate_rps: float) -> Flow:
        return msgspec.structs.replace(self, rate_rps=rate_rps)

    def times(self, factor: float) -> Flow:
        return self.at(self.rate_rps * factor)


LATENCY_SPAN_S = 60.0  # Of measured quantiles: enough requests for a P99 at 2 requests/s, recent enough to follow a change.
LOWER_TENTHS = 0.561  # Of a squared normal variable's mean lies below its 90th percentile: P(chi2_3 < 2.706).

EMPTY = Flow(rate_rps=0.0, prompt_tokens=0.0, prompt_tokens_sd=0.0, context_tokens=0.0, output_tokens=0.0)


class Window(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long is looked back, and how sure one must be."""

    rise_s: tuple[float, ...] = (5.0, 15.0, 60.0, 180.0)
    """Windows in which a rise may show. The last one's mean is believed as it is while the SLO is missed."""
    fall_s: float = 180.0
    """A fall is believed when no part of it was busier. Longer than most lulls of a minute-scale burst (Azure 2023)."""
    fall_part_s: float = 60.0
    """Length of such a part: of a shorter one the count says little."""
    sigmas: float = 4.0
    """Standard deviations of a count: looked at each second, three are passed by chance each few hours, four once in some weeks."""
    kept_share: float = 0.9
    """Until surely fewer requests are measured to be inside their SLO, a rise must be sure: not even the longest window's mean is
    believed as it is. And while fewer are, nothing is taken away. Sized for 0.99, a fleet misses a few of a hundred where the load
    swings about what it carries."""

    def __post_init__(self) -> None:
        if not self.rise_s or list(self.rise_s) != sorted(set(self.rise_s)):
            raise ValueError(f"rise_s {list(self.rise_s)} is not one window or more, shortest first")
        positive(rise_s=self.rise_s[0], fall_s=self.fall_s, fall_part_s=self.fall_part_s)
        at_least(0.0, sigmas=self.sigmas)
        share(kept_share=self.kept_share)
        if self.fall_part_s > self.fall_s:
            raise ValueError(f"fall_s {self.fall_s} is below {self.fall_part_s}, fall_part_s")


def mix(buckets: Sequence[Demand], rate_rps: float, dispersion: float) -> Flow:
    """The mean lengths of all that arrived in the buckets, at a rate."""
    requests = sum(bucket.requests for bucket in buckets)
    if requests <= 0.0:
        return EMPTY
    prompt = sum(bucket.prompt_tokens for bucket in buckets) / requests
    squared = sum(bucket.prompt_tokens_squared for bucket in buckets) / requests
    cached = sum(bucket.cached_tokens for bucket in buckets) / requests
    return Flow(
        rate_rps=rate_rps,
        prompt_tokens=prompt,
        prompt_tokens_sd=math.sqrt(max(0.0, squared - prompt * prompt)),
        context_tokens=prompt + cached,
        output_tokens=sum(bucket.output_tokens for bucket in buckets) / requests,
        dispersion=dispersion,
    )


def risen(workload: Workload, window: Window, ahead_s: float = 0.0) -> Flow:
    """The flow to have capacity for now: never below what a lower bound shows, with its trend carried `ahead_s` seconds on.

    Of the longest window the mean is taken where the SLO is missed, once that window is full.
    """
    full = len(workload.buckets) * workload.bucket_s >= window.rise_s[-1]
    by_mean = full and missed(workload, window)
    dispersion = index_of_dispersion(workload.buckets)
    longest = _last(workload, window.rise_s[-1])
    rate_rps = 0.0
    for span_s in window.rise_s:
        last = _last(workload, span_s)
        count = _requests(last)
        sigmas = 0.0 if by_mean and span_s == window.rise_s[-1] else window.sigmas
        if last:
            rate_rps = max(rate_rps, (count - sigmas * math.sqrt(dispersion * count)) / (len(last) * workload.bucket_s))
    return mix(longest, max(rate_rps, _trend(longest, workload.bucket_s, dispersion, window.sigmas, ahead_s)), dispersion)


def fallen(workload: Workload, window: Window) -> Flow:
    """The flow below which demand has surely stayed: the upper bound of the busiest `fall_part_s` within `fall_s`.

    Of a past that is shorter than that (see `reaches_back`) it says nothing about the rest.
    """
    dispersion = index_of_dispersion(workload.buckets)
    last = _last(workload, window.fall_s)
    length = max(1, round(window.fall_part_s / workload.bucket_s))
    sums = list(itertools.accumulate((bucket.requests for bucket in last), initial=0.0))
    count = max((late - early for early, late in zip(sums, sums[length:], strict=False)), default=sums[-1])
    rate_rps = (count + window.sigmas * math.sqrt(dispersion * count)) / (length * workload.bucket_s)
    return mix(last, rate_rps, dispersion)


def missed(workload: Workload, window: Window) -> bool:
    """Whether surely fewer than `window.kept_share` of the requests are inside their SLO, or none ends at all.

    How sure one is, the count of the span says over which it was measured.
    """
    if workload.attainment is None:  # Without an SLO nothing is missed.
        return workload.ttft is None
    count = max(1.0, _requests(_last(workload, LATENCY_SPAN_S)))
    error = math.sqrt(window.kept_share * (1.0 - window.kept_share) / count)
    return workload.attainment < window.kept_share - window.sigmas * error


def kept(workload: Workload, window: Window) -> bool:
    """Whether enough requests are inside their SLO for something to be taken away, as far as is known."""
    return workload.attainment is None or workload.attainment >= window.kept_share


def reaches_back(workload: Workload, window: Window) -> bool:
    """Whether enough of the past is known to believe in a fall."""
    return len(workload.buckets) * workload.bucket_s >= window.fall_s


def index_of_dispersion(buckets: Sequence[Demand]) -> float:
    """Variance over mean of the buckets' counts about their moving level, at least 1; 1 with too little to tell.

    Half the mean squared difference of neighbours is a variance that a slow trend does not inflate (von Neumann, 1941). The largest
    tenth is left out, so that a step in the load is not taken for noise.
    """
    counts = [bucket.requests for bucket in buckets]
    mean = sum(counts) / len(counts) if counts else 0.0
    if len(counts) < 10 or mean <= 0.0:
        return 1.0
    squares = sorted((later - earlier) ** 2 for earlier, later in itertools.pairwise(counts))
    kept = squares[: len(squares) - len(squares) // 10]
    return max(1.0, sum(kept) / (2 * len(squares) * LOWER_TENTHS) / mean)


def _trend(buckets: Sequence[Demand], bucket_s: float, dispersion: float, sigmas: float, ahead_s: float) -> float:
    """Requests/s in `ahead_s` if they go on to grow; 0 unless they surely grew in both halves, as no step does."""
    half = len(buckets) // 2
    halves = buckets[len(buckets) - 2 * half : len(buckets) - half], buckets[len(buckets) - half :]
    if min(_growth(part, bucket_s, dispersion, sigmas) for part in halves) <= 0.0:
        return 0.0
    span_s = len(buckets) * bucket_s
    return _requests(buckets) / span_s + _growth(buckets, bucket_s, dispersion, sigmas) * (span_s / 2 + ahead_s)


def _growth(buckets: Sequence[Demand], bucket_s: float, dispersion: float, sigmas: float) -> float:
    """Requests/s gained per second, its lower bound, never below 0: the least-squares slope less its standard errors."""
    length = len(buckets)
    if length < 3:
        return 0.0
    centre = (length - 1) / 2
    spread = sum((index - centre) ** 2 for index in range(length))
    slope = sum((index - centre) * bucket.requests for index, bucket in enumerate(buckets)) / spread
    error = math.sqrt(dispersion * _requests(buckets) / length / spread)
    return max(0.0, slope - sigmas * error) / (bucket_s * bucket_s)


def _last(workload: Workload, span_s: float) -> Sequence[Demand]:
    return workload.buckets[-max(1, round(span_s / workload.bucket_s)) :]


def _requests(buckets: Sequence[Demand]) -> float:
    return sum(bucket.requests for bucket in buckets)
