"""Piecewise linear functions given by knots: their value, and the sum of many values in a row. Pure arithmetic.

Knots are (place, value) pairs with strictly rising places. Beyond the last knot a function goes on along its last two, and
before the first along its first two.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator

from cluster.errors import InvalidConfig

Knots = tuple[tuple[float, float], ...]
Segment = tuple[int, float, float]
"""How many places lie on one line, the value at the first of them, and what each adds to the one before."""


def value_at(knots: Knots, place: float) -> float:
    """The function's value at a place."""
    (left, low), (right, high) = knots[index := _line(knots, place)], knots[index + 1]
    return low + (place - left) * ((high - low) / (right - left))


def segments(knots: Knots, place: float, stride: float, count: int) -> Iterator[Segment]:
    """The values at `count` places, the first at `place` and each `stride` >= 0 further, as arithmetic progressions in order."""
    while count > 0:
        index = _line(knots, place)
        (left, low), (right, high) = knots[index], knots[index + 1]
        slope = (high - low) / (right - left)
        here = count
        if stride > 0.0 and index + 2 < len(knots):
            # Those before the line's end, at least this one: rounding must not let the walk stand still.
            here = min(count, max(1, math.ceil((right - place) / stride)))
        yield here, low + (place - left) * slope, stride * slope
        place += here * stride
        count -= here


def check_knots(name: str, knots: Knots, *, from_zero: bool = True, rising: bool = True) -> None:
    """Raise InvalidConfig for knots that are no function, or not one that starts with 0 at 0 and never falls."""
    if len(knots) < 2:
        raise InvalidConfig(f"{name} has {len(knots)} knots, below 2, which a line takes")
    if knots[0][0] != 0.0 or (from_zero and knots[0][1] != 0.0):
        raise InvalidConfig(f"{name}[0] is {knots[0]}, where {'(0, 0)' if from_zero else 'a place of 0'} must stand")
    for index, (place, value) in enumerate(knots):
        if not (math.isfinite(place) and math.isfinite(value) and value >= 0.0):
            raise InvalidConfig(f"{name}[{index}] is {(place, value)}: neither may be infinite, nor the value below 0")
    for index in range(1, len(knots)):
        (left, low), (right, high) = knots[index - 1], knots[index]
        if right <= left:
            raise InvalidConfig(f"{name}[{index}] is at {right:g}, not above {left:g}, the place of the knot before it")
        if rising and high < low:
            raise InvalidConfig(f"{name}[{index}] is {high:g}, below {low:g}, the value of the knot before it")


def _line(knots: Knots, place: float) -> int:
    """Index of the first of the two knots whose line goes through a place."""
    if len(knots) == 2:
        return 0
    return min(max(bisect_right(knots, (place, math.inf)), 1), len(knots) - 1) - 1
