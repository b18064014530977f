"""Fits step tables to measurements: non-negative least squares of relative error, knots where there are measurements.

A measurement is the seconds of one step, or of some in a row, whose features are known. Every coefficient of a table is a
part >= 0 of such a sum, so that one linear fit finds them all and no function of the table falls. What it does not do: tell
parts apart that never varied apart. Where all prompts are computed whole, for instance, pairs follow from tokens; and where
no batch has contexts of several lengths, KV tokens follow from sequences: the cost of one is then to be given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidConfig
from cluster.least_squares import non_negative
from cluster.piecewise import Knots
from cluster.step_table import Bounds, Fit, StepTable, flat_beyond

MAX_KNOTS = 9  # Doublings from 16 to 4096: measured curves bend no more often, and a knot too many follows noise.
APART = 1.2  # The least ratio of two places: between two that are nearer, a slope is noise.
Array = NDArray[np.float64]


class Step(NamedTuple):
    """What a step computes: the arguments of `StepTable.step_time_s`."""

    prefill_tokens: float = 0.0
    prefill_pairs: float = 0.0
    sequences: float = 0.0
    kv_tokens: float = 0.0


class Measured(NamedTuple):
    """Steps in a row, and how long they took together, > 0."""

    steps: tuple[Step, ...]
    seconds: float


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """What a fit takes over instead of finding it."""

    prefill: Knots | None = None
    """With `prefill_pair_s`; None fits both."""
    prefill_pair_s: float | None = None
    kv_token_s: float | None = None
    """Seconds per KV token; None fits it."""
    idle_w: float = 0.0
    prefill_w: float = 0.0
    decode_w: Knots = ((0.0, 0.0), (1.0, 0.0))


def fit_table(points: Sequence[Measured], *, fit: Fit, given: Given = Given(), kv_knots: int = 1) -> StepTable:
    """The table nearest to the points, with its errors in a copy of `fit`, whose domain is set from them.

    Each inner point is also predicted by a fit to all others, and those errors are stated as held out: inner means that other
    points lie at or beyond it on both sides of every axis it is on. kv_knots: how often the cost of KV may bend, plus one.
    Raises InvalidConfig without points.
    """
    if not points:
        raise InvalidConfig(f"no measurement of {fit.model} on {fit.hardware} to fit a table to")
    table = _fitted(points, given, fit, kv_knots)
    errors = [relative_error(table, point) for point in points]
    held_out = _held_out(points, lambda others: _fitted(others, given, fit, kv_knots))
    stated = msgspec.structs.replace(
        table.fit,
        points=len(points),
        mean_error=_mean(errors),
        largest_error=max(errors),
        held_out="each shape of step inside the domain in turn, predicted by a fit to all others" if held_out else "",
        held_out_points=len(held_out),
        held_out_mean_error=_mean(held_out) if held_out else None,
        held_out_largest_error=max(held_out, default=None),
    )
    return msgspec.structs.replace(table, fit=stated)


def seconds_of(table: StepTable, steps: Iterable[Step]) -> float:
    """What a table says that such steps take together."""
    return math.fsum(table.step_time_s(*step) for step in steps)  # type: ignore[arg-type]


def relative_error(table: StepTable, point: Measured) -> float:
    """Of the table's seconds against the measured ones; 0.03 is 3 %."""
    return abs(seconds_of(table, point.steps) / point.seconds - 1)


def watts_by_batch(rows: Sequence[tuple[float, float]], most: int = 6) -> Knots:
    """Knots of watts, least squares, over rows of (decoding sequences, watts); flat before the first and after the last."""
    places = _places((batch for batch, _ in rows), from_first=True, most=most)
    if len(places) == 1:
        watts = _mean([watt for _, watt in rows])
        return ((0.0, watts), (places[0], watts), (places[0] + 1.0, watts))
    # Each row is a mixture of the two knots around it.
    shares = np.array(
        [[float(np.interp(batch, places, np.eye(len(places))[at])) for at in range(len(places))] for batch, _ in rows]
    )
    solved = np.linalg.lstsq(shares, np.array([watts for _, watts in rows]), rcond=None)[0].tolist()
    return flat_beyond(((0.0, solved[0]), *zip(places, solved, strict=True)))


def _fitted(points: Sequence[Measured], given: Given, fit: Fit, kv_knots: int) -> StepTable:
    steps = [step for point in points for step in point.steps]
    decodes = [step.sequences for step in steps if step.sequences]
    prompt_places = _places((step.prefill_tokens for step in steps), from_first=bool(decodes))
    batch_places = _places(iter(decodes), from_first=False)
    kv_places = _places((step.kv_tokens for step in steps), from_first=True, most=kv_knots)
    fixed = given.prefill_pair_s if given.prefill is not None else None
    base = StepTable(
        step_s=0.0,
        prefill=given.prefill or _ZERO,
        prefill_pair_s=fixed or 0.0,
        decode=_ZERO,
        kv=_ZERO if given.kv_token_s is None else ((0.0, 0.0), (1.0, given.kv_token_s)),
        idle_w=given.idle_w,
        prefill_w=given.prefill_w,
        decode_w=given.decode_w,
        fit=_over(fit, steps),
    )
    columns = [
        _sums(points, lambda step: np.ones((len(step), 1))),
        _sums(points, lambda step: _ramps(step[:, 0], prompt_places if given.prefill is None else [])),
        _sums(points, lambda step: step[:, 1:2] if given.prefill is None else step[:, :0]),
        _sums(points, lambda step: _ramps(step[:, 2], batch_places)),
        _sums(points, lambda step: _ramps(step[:, 3], kv_places if given.kv_token_s is None else [])),
    ]
    measured = np.array([point.seconds for point in points])
    left = measured - np.array([seconds_of(base, point.steps) for point in points])
    solved = non_negative(np.hstack(columns), left, measured)
    ends = np.cumsum([column.shape[1] for column in columns])
    step_s, prompts, pairs, batches, kv = (part.tolist() for part in np.split(np.array(solved), ends[:-1]))
    return msgspec.structs.replace(
        base,
        step_s=step_s[0],
        prefill=base.prefill if given.prefill is not None else _knots(prompt_places, prompts),
        prefill_pair_s=base.prefill_pair_s if given.prefill is not None else pairs[0],
        decode=_knots(batch_places, batches),
        kv=base.kv if given.kv_token_s is not None else _knots(kv_places, kv),
    )


def _held_out(points: Sequence[Measured], fitted: Callable[[list[Measured]], StepTable]) -> list[float]:
    """Errors of points that a fit to all points of other shapes predicts."""
    shapes = sorted({point.steps for point in points})
    errors: list[float] = []
    for shape in shapes:
        others = [point for point in points if point.steps != shape]
        if _inside(shape, [other for other in shapes if other != shape]):
            table = fitted(others)
            errors += [relative_error(table, point) for point in points if point.steps == shape]
    return errors


def _inside(shape: tuple[Step, ...], others: Sequence[tuple[Step, ...]]) -> bool:
    """Whether others lie at or below it, and at or above, on every axis it is on."""
    for axis in range(4):
        here = [max(step[axis] for step in other) for other in others]
        value = max(step[axis] for step in shape)
        kin = [place for place in here if place > 0.0]
        if value > 0.0 and not (kin and min(kin) <= value <= max(kin)):
            return False
    return True


def _over(fit: Fit, steps: Sequence[Step]) -> Fit:
    def bounds(axis: int) -> Bounds:
        values = [step[axis] for step in steps if step[axis] > 0.0]
        return (float(min(values)), float(max(values))) if values else (0.0, 0.0)

    return msgspec.structs.replace(fit, prefill_tokens=bounds(0), sequences=bounds(2), kv_tokens=bounds(3))


_ZERO: Knots = ((0.0, 0.0), (1.0, 0.0))


def _places(values: Iterable[float], *, from_first: bool, most: int = MAX_KNOTS) -> list[float]:
    """Where knots go: at measured places, at most so many.

    from_first: also at the least. Without, the line from 0 to the second is what the least two tell apart from `step_s`.
    """
    found: list[float] = []
    for value in sorted({float(value) for value in values if value > 0.0}):
        if not found or value >= APART * found[-1]:
            found.append(value)
    return _spaced(found[1:] if len(found) > 1 and not from_first else found, most)


def _spaced(places: list[float], most: int) -> list[float]:
    """At most so many of them, spaced evenly in the logarithm, the last one kept."""
    if len(places) <= most:
        return places
    if most == 1:
        return places[-1:]
    wanted = np.geomspace(places[0], places[-1], most)
    return sorted({min(places, key=lambda place: abs(math.log(place / want))) for want in wanted.tolist()})


def _ramps(values: Array, places: Sequence[float]) -> Array:
    """How far each value has come on each line between 0 and the places; beyond the last place its line goes on."""
    starts = [0.0, *places][: len(places)]
    columns = [
        np.clip((values - start) / (end - start), 0.0, None if end == places[-1] else 1.0)
        for start, end in zip(starts, places, strict=True)
    ]
    return np.stack(columns, axis=1) if columns else np.empty((len(values), 0))


def _sums(points: Sequence[Measured], features: Callable[[Array], Array]) -> Array:
    """A row a point: its steps' features, added up."""
    return np.array([features(np.array(point.steps, dtype=float)).sum(axis=0) for point in points]).reshape(len(points), -1)


def _knots(places: Sequence[float], rises: Sequence[float]) -> Knots:
    if not places:
        return _ZERO
    return ((0.0, 0.0), *zip(places, np.cumsum(rises).tolist(), strict=True))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
