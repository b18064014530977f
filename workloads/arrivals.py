"""When requests arrive: a renewal process whose rate is piecewise constant, drawn in chunks.

Gaps have the mean 1 in expected requests and are stretched by the rate that holds when they pass (time rescaling), so that a
change of the rate holds at once and needs no thinning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

CHUNK = 4096  # Rows drawn at once: enough to amortise numpy's calls, little enough to hold.
STEPS_A_PERIOD = 1440  # A minute of a day: within it the rate is constant, at most 0.3 % of the swing from the sine.

Steps = tuple[tuple[float, float], ...]
"""(requests per second >= 0, seconds > 0), one after the other."""


def arrivals(steps: Steps, burstiness: float, chance: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """Times in ascending order, in microseconds' precision; every chunk but the last has CHUNK of them.

    burstiness: shape of the gamma distributed gaps, > 0: 1 is Poisson, below is burstier, above more even (as in vLLM's benchmark).
    """
    rates, edges_s, expected = np.array([rate for rate, _ in steps]), *_edges(steps)
    passed = 0.0
    while True:
        gaps = chance.standard_exponential(CHUNK) if burstiness == 1.0 else chance.gamma(burstiness, 1.0 / burstiness, CHUNK)
        targets = passed + np.cumsum(gaps)
        passed = float(targets[-1])
        inside = targets[: np.searchsorted(targets, expected[-1])]
        places = np.searchsorted(expected, inside, side="right") - 1
        yield np.round(edges_s[places] + (inside - expected[places]) / rates[places], 6)
        if len(inside) < CHUNK:
            return


def span_s(steps: Steps) -> float:
    return sum(seconds for _, seconds in steps)


def expected_until(steps: Steps, until_s: float) -> float:
    """Mean number of arrivals before a time."""
    return float(np.interp(until_s, *_edges(steps)))


def diurnal(low: float, high: float, period_s: float, whole_s: float) -> Steps:
    """A rate that swings as a sine from `low`, where it begins, to `high` half a period later. Each step has the sine's mean."""
    step_s = period_s / STEPS_A_PERIOD
    edges_s = np.append(step_s * np.arange(math.ceil(round(whole_s / step_s, 6))), whole_s)
    swing = (high - low) / 2
    passed = (low + swing) * edges_s - swing * period_s / (2 * np.pi) * np.sin(2 * np.pi * edges_s / period_s)
    lasting = np.diff(edges_s)
    rates = np.clip(np.diff(passed) / lasting, low, high)
    return tuple(zip(rates.tolist(), lasting.tolist(), strict=True))


def _edges(steps: Steps) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where steps begin and the last ends: in seconds, and in expected arrivals."""
    seconds = itertools.accumulate((seconds for _, seconds in steps), initial=0.0)
    expected = itertools.accumulate((rate * seconds for rate, seconds in steps), initial=0.0)
    return np.fromiter(seconds, float), np.fromiter(expected, float)
