"""Counts of values in buckets whose bounds grow by a constant factor: any quantile to a known relative error, in bounded memory.

DDSketch (Masson, Rim, Lee, VLDB'19), section 2: with growth g = (1 + a) / (1 - a) the estimate 2 g^i / (g + 1) of bucket
(g^(i-1), g^i] is off by at most the share a. Buckets are laid out in advance for 10 us to a day; beyond, values count as the last.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

ERROR = 0.005
"""Relative, of every quantile."""
LEAST_S, MOST_S = 1e-5, 1e5
_GROWTH = (1 + ERROR) / (1 - ERROR)
_LOG_GROWTH = math.log(_GROWTH)
BUCKETS = math.ceil(math.log(MOST_S / LEAST_S) / _LOG_GROWTH) + 1


@njit(cache=True)
def bucket_of(value_s: float) -> int:
    if value_s <= LEAST_S:
        return 0
    return min(math.ceil(math.log(value_s / LEAST_S) / _LOG_GROWTH), BUCKETS - 1)


def quantiles_s(counts: NDArray[np.int64], shares: tuple[float, ...]) -> tuple[float, ...] | None:
    """At each share in [0, 1]; None where nothing was counted."""
    total = np.cumsum(counts)
    if not len(total) or total[-1] == 0:
        return None
    ranks = np.maximum(np.ceil(np.array(shares) * total[-1]), 1)
    return tuple(float(value) for value in _middle(np.searchsorted(total, ranks)))


def mean_s(counts: NDArray[np.int64]) -> float | None:
    total = int(counts.sum())
    return float((_middle(np.arange(len(counts))) * counts).sum() / total) if total else None


def share_within(counts: NDArray[np.int64], bound_s: float) -> float | None:
    """Share of values at most a bound, to the bucket that it lies in."""
    total = int(counts.sum())
    return float(counts[: bucket_of(bound_s) + 1].sum() / total) if total else None


def _middle(index: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(index == 0, LEAST_S, LEAST_S * 2 * _GROWTH ** index.astype(np.float64) / (_GROWTH + 1))
