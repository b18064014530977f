"""The highest rate at which a system still keeps its promise, found as all these papers find it: by trying rates."""

from __future__ import annotations

from collections.abc import Callable

from cluster.errors import InvalidConfig

WIDENINGS = 16
"""Doublings or halvings until rates are bracketed: from the first guess, a factor of 65,536 either way."""


def highest_rate(keeps: Callable[[float], bool], guess: float, precision: float = 0.03) -> float:
    """The highest rate that `keeps` allows, to a relative `precision`; 0.0 where not even the lowest tried does.

    `keeps` should be a falling function of the rate, so its jobs must be the same at all rates but for their times. Raises
    InvalidConfig where it holds at every rate that is tried.
    """
    low, high = _bracket(keeps, guess)
    while low and high / low > 1.0 + precision:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def quotient(rate: float, other: float) -> float | None:
    """How many times the other rate; None where that is 0."""
    return rate / other if other else None


def _bracket(keeps: Callable[[float], bool], guess: float) -> tuple[float, float]:
    if keeps(guess):
        for _ in range(WIDENINGS):
            if not keeps(2 * guess):
                return guess, 2 * guess
            guess *= 2
        raise InvalidConfig(f"the promise is kept even at {guess:g} requests per second: it bounds nothing")
    for _ in range(WIDENINGS):
        guess /= 2
        if keeps(guess):
            return guess, 2 * guess
    return 0.0, guess
