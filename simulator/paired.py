"""Two policy sets on the same draws: what their difference is, how sure that is, and who wins.

Pairs share their seed, so a generator makes both the same requests, and the world draws for both from streams of equal seeds
(common random numbers; Law, "Simulation Modeling and Analysis", 11.2): the n-th replica that starts is equally slow in both. What
is left of chance is in the interval of the paired differences. With a trace file requests are the same in all pairs: then it is
the interval over the world's chance, and says nothing about other traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet
from controller.pipelines import spelled_out
from simulator.interval import CONFIDENCE, Interval, interval
from simulator.outcome import METRICS, Metric, Outcome

DECIDING = ("attainment", "usd_per_million_output_tokens", "kwh")
"""The order in which an operator asks: are promises kept, what does it cost, how much power does it take."""
WORTH = {"attainment": 0.001}
"""Differences of at most so much are of no account for the verdict: a tenth of a point of attainment is no ground for a dearer
fleet. Others have none: what costs less for the same attainment is better."""

ALIKE = 0.01
"""Cost and energy decide only once attainment is known to differ by less, either way: what is not shown may still be there."""

Side = Literal["A", "B"]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Of one metric, B less A."""

    metric: str
    a: Interval
    b: Interval
    difference: Interval
    better: Side | None
    """None where no difference is shown."""
    alike: bool
    """Not one pair differs."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Of A and B."""

    pairs: int
    differences: list[Difference]
    winner: Side | None
    by: str | None
    """The metric that decides; None without a winner."""
    undecided: tuple[float, float] | None
    """The interval of B's attainment less A's, where it is too wide for others to decide."""
    confidence: float = CONFIDENCE


def compared(pairs: Sequence[tuple[Outcome, Outcome]]) -> Comparison:
    """Of two pairs or more. Raises InvalidConfig for fewer: one pair cannot tell chance from a difference."""
    if len(pairs) < 2:
        raise InvalidConfig(f"{len(pairs)} pair is below 2, the fewest that have an interval")
    found = [_difference(metric, pairs) for metric in METRICS]
    differences = [one for one in found if one is not None]
    undecided = next((_ends(one) for one in differences if one.metric == DECIDING[0] and not _known(one)), None)
    fields = DECIDING if undecided is None else ()
    decided = next((one for field in fields for one in differences if one.metric == field and _counts(one)), None)
    return Comparison(
        pairs=len(pairs),
        differences=differences,
        winner=decided.better if decided else None,
        by=decided.metric if decided else None,
        undecided=undecided,
    )


def words(found: Comparison) -> str:
    """The verdict as a person would say it."""
    metrics = {metric.field: metric for metric in METRICS}
    said = [_said(metrics[one.metric], one) for one in found.differences if one.better is not None]
    alike = [metrics[one.metric].words for one in found.differences if one.alike]
    unshown = [metrics[one.metric].words for one in found.differences if one.better is None and not one.alike]
    if unshown:
        said.append(f"no difference shown in {_and(unshown)}")
    if alike:
        said.append(f"the same to the last digit in {_and(alike)}")
    return "; ".join(said)


def winning(fleet: Fleet) -> Fleet:
    """The fleet with every field of its pipeline spelled out."""
    control = msgspec.structs.replace(fleet.control, pipeline=spelled_out(fleet.control.pipeline))
    return msgspec.structs.replace(fleet, control=control)


def challenged(fleet: Fleet, name: str, place: str) -> Fleet:
    """The fleet where that challenger acts, and is a challenger no more. Raises InvalidConfig for one that it does not have."""
    control = fleet.control
    if name not in control.challengers:
        known = ", ".join(control.challengers) or "none"
        raise InvalidConfig(f"{place}: control.challengers has no {name!r}; there are: {known}")
    others = {other: spec for other, spec in control.challengers.items() if other != name}
    acting = msgspec.structs.replace(control, pipeline=control.challengers[name], challengers=others)
    return msgspec.structs.replace(fleet, control=acting)


def other_differences(a: Fleet, b: Fleet) -> list[str]:
    """What two fleets differ in beside their policies and names: with any of it, it is not policies alone that are compared."""
    settings = [field for field in Fleet.__struct_fields__ if field not in ("name", "control", "telemetry")]
    return [field for field in settings if getattr(a, field) != getattr(b, field)]


def _difference(metric: Metric, pairs: Sequence[tuple[Outcome, Outcome]]) -> Difference | None:
    """None where some run has no such number."""
    of_a, of_b = ([getattr(pair[side], metric.field) for pair in pairs] for side in (0, 1))
    if None in of_a or None in of_b:
        return None
    gains = [b - a for a, b in zip(of_a, of_b, strict=True)]
    difference = interval(gains)
    better: Side | None = None
    if difference.excludes_zero:
        better = "B" if (difference.mean > 0.0) == metric.more_is_better else "A"
    return Difference(
        metric=metric.field,
        a=interval(of_a),
        b=interval(of_b),
        difference=difference,
        better=better,
        alike=not any(gains),
    )


def _ends(one: Difference) -> tuple[float, float]:
    width = one.difference.half_width or 0.0
    return one.difference.mean - width, one.difference.mean + width


def _known(one: Difference) -> bool:
    """Whether its sign is shown, or that it is nearly zero."""
    return one.better is not None or max(map(abs, _ends(one))) <= ALIKE


def _counts(one: Difference) -> bool:
    return one.better is not None and abs(one.difference.mean) > WORTH.get(one.metric, 0.0)


def _said(metric: Metric, one: Difference) -> str:
    gain, width = abs(one.difference.mean) * metric.scale, (one.difference.half_width or 0.0) * metric.scale
    return f"{one.better} is better in {metric.words} by {gain:.3g} +- {width:.2g} {metric.unit}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
