"""A mean and how sure one is of it: the t-interval over independent runs ("Student", "The probable error of a mean", 1908)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec
from scipy.special import stdtrit

CONFIDENCE = 0.95


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """Mean +- half width."""

    mean: float
    half_width: float | None
    """At `CONFIDENCE`, each interval for itself. None for a single value, of which nobody knows how far others would be."""
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign of the mean is shown."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Of at least one value. Their distribution is taken for normal."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean=mean, half_width=None, count=1)
    quantile = float(stdtrit(count - 1, (1 + confidence) / 2))
    return Interval(mean=mean, half_width=quantile * statistics.stdev(values) / math.sqrt(count), count=count)
