"""What became of each request of a run, and how many of them kept their bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

WORST_SHARE = 0.1
"""A request's TBT is the mean of its worst tenth of gaps (Mooncake, FAST'25, section 5)."""


class Served(NamedTuple):
    """One request."""

    prompt: int
    cached: int
    """Of the prompt's tokens, those that were not computed."""
    ttft_s: float
    """Infinite for one that was rejected, as is `tbt_s`."""
    tbt_s: float
    late: bool = False
    """Rejected when its prompt had been computed already."""

    @property
    def rejected(self) -> bool:
        return math.isinf(self.ttft_s)


def worst_gaps_s(lasting_s: float, gaps: int, stalls_s: Sequence[float]) -> float:
    """Mean of the worst tenth of a request's gaps, of which some held a stall and all else were alike.

    lasting_s: of all gaps together. stalls_s: how much longer than the others those with a stall were.
    """
    if gaps < 1:
        return 0.0
    step_s = max(0.0, lasting_s - sum(stalls_s)) / gaps
    worst = math.ceil(WORST_SHARE * gaps)
    return step_s + sum(sorted(stalls_s, reverse=True)[:worst]) / worst


def attained(served: Sequence[Served], *, ttft_s: float = math.inf, tbt_s: float = math.inf) -> float:
    """Share of all requests that kept these bounds."""
    return sum(each.ttft_s <= ttft_s and each.tbt_s <= tbt_s for each in served) / len(served)


def hit_rate(served: Sequence[Served]) -> float:
    """Of prompt tokens."""
    return sum(each.cached for each in served) / sum(each.prompt for each in served)
