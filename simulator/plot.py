"""Plots over time as SVG: lines, stacked areas, bounds and marks, coloured by the classes of the page that they stand in.

They are drawn here and not by a plotting library so that a page's style decides their colours, by day, by night and in print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import Literal

import msgspec

from simulator.summary import clock

LEFT, RIGHT, TOP, BOTTOM = 52, 14, 16, 24  # Around the axes, in units of the drawing, a pixel each at full width.
TICKS = 4  # About so many on the y axis.
TIMES = 6  # At least about so many on the x axis.
STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 604800)


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One value for each interval; None breaks the line. style: a class of the page."""

    name: str
    values: Sequence[float | None]
    style: str
    area: bool = False
    """Filled, and stacked on the areas before it."""


class Bound(msgspec.Struct, frozen=True):
    """A horizontal line."""

    name: str
    value: float


class Mark(msgspec.Struct, frozen=True):
    """Something that happened: a tick above the axes or, if it is grave, a line through them."""

    at_s: float
    words: str
    kind: Literal["act", "event", "grave"]


class Plot(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in one pair of axes."""

    title: str
    unit: str
    series: Sequence[Series]
    bounds: Sequence[Bound] = ()
    wide: bool = False
    """Over the page's whole width; others take half of it."""

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Names and styles, where there is more than one thing to tell apart."""
        named = [(one.name, one.style + (" area" if one.area else "")) for one in self.series if one.name]
        return named if len(named) > 1 else []


class _Axes(msgspec.Struct, frozen=True, kw_only=True):
    width: int
    height: int
    until_s: float
    most: float

    def x(self, at_s: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * at_s / self.until_s

    def y(self, value: float) -> float:
        return TOP + (self.height - TOP - BOTTOM) * (1.0 - min(value, self.most) / self.most)


def svg(plot: Plot, every_s: float, until_s: float, marks: Sequence[Mark] = ()) -> str:
    """One drawing. every_s: an interval's length; until_s: the end of the time axis, > 0."""
    ticks = _ticks(_highest(plot))
    width = 1080 if plot.wide else 530
    axes = _Axes(width=width, height=240 if plot.wide else 200, until_s=until_s, most=ticks[-1])
    parts = [
        f'<svg viewBox="0 0 {axes.width} {axes.height}" role="img" aria-label="{escape(plot.title)}">',
        *_grid(axes, ticks),
        *_areas(axes, plot, every_s),
        *_lines(axes, plot, every_s),
        *(_bound(axes, bound) for bound in plot.bounds if bound.value <= axes.most),
        *(_mark(axes, mark) for mark in marks if mark.at_s <= until_s),
        "</svg>",
    ]
    return "".join(parts)


def _highest(plot: Plot) -> float:
    """Of all that is drawn. A bound far above everything is left out rather than flatten the rest."""
    areas = [one for one in plot.series if one.area]
    stacked = [sum(value or 0.0 for value in column) for column in zip(*(one.values for one in areas), strict=True)]
    lines = [value for one in plot.series if not one.area for value in one.values if value is not None]
    highest = max((*stacked, *lines), default=0.0)
    near = [bound.value for bound in plot.bounds if bound.value <= 4 * highest]
    return max((highest, *(1.1 * value for value in near)))


def _ticks(highest: float) -> list[float]:
    """Round numbers from 0 to the first that is not below the highest value."""
    if highest <= 0.0:
        return [0.0, 1.0]
    size = 10 ** math.floor(math.log10(highest / TICKS))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if highest / (size * factor) <= TICKS)
    return [step * number for number in range(math.ceil(highest / step - 1e-9) + 1)]


def _grid(axes: _Axes, ticks: Sequence[float]) -> Iterator[str]:
    right, bottom = axes.width - RIGHT, axes.height - BOTTOM
    for tick in ticks:
        y = axes.y(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
    step_s = next((step for step in STEPS_S if axes.until_s / step <= TIMES * (2 if axes.width > 600 else 1)), STEPS_S[-1])
    for number in range(math.floor(axes.until_s / step_s) + 1):
        x = axes.x(number * step_s)
        yield f'<line class="stem" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{clock(number * step_s)}</text>'


def _short(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= 10 * size or (size > 1e3 and value >= size):
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _areas(axes: _Axes, plot: Plot, every_s: float) -> Iterator[str]:
    """As steps: a count holds for the whole of its interval."""
    below = None
    for one in (one for one in plot.series if one.area):
        floor = below or [0.0] * len(one.values)
        above = [low + (value or 0.0) for low, value in zip(floor, one.values, strict=True)]
        if above:
            outline = _steps(axes, above, every_s) + _steps(axes, floor, every_s)[::-1]
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in outline)
            yield f'<polygon class="area {one.style}" points="{points}"><title>{escape(one.name)}</title></polygon>'
        below = above


def _steps(axes: _Axes, values: Sequence[float], every_s: float) -> list[tuple[float, float]]:
    """Corners; a run of equal values has two."""
    starts = [0, *(right for left, right in pairwise(range(len(values))) if values[left] != values[right]), len(values)]
    ends = [(axes.x(left * every_s), axes.x(right * every_s), axes.y(values[left])) for left, right in pairwise(starts)]
    return [point for left, right, y in ends for point in ((left, y), (right, y))]


def _lines(axes: _Axes, plot: Plot, every_s: float) -> Iterator[str]:
    for one in (one for one in plot.series if not one.area):
        pen, path = "M", []
        for number, value in enumerate(one.values):
            if value is None:
                pen = "M"
                continue
            path.append(f"{pen}{axes.x((number + 0.5) * every_s):.1f} {axes.y(value):.1f}")
            pen = "L"
        yield f'<path class="line {one.style}" d="{"".join(path)}"><title>{escape(one.name)}</title></path>'


def _bound(axes: _Axes, bound: Bound) -> str:
    y, right = axes.y(bound.value), axes.width - RIGHT
    return (
        f'<line class="bound" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="bound-name" x="{right}" y="{y - 4:.1f}" text-anchor="end">{escape(bound.name)}</text>'
    )


def _mark(axes: _Axes, mark: Mark) -> str:
    x, foot = axes.x(mark.at_s), axes.height - BOTTOM if mark.kind == "grave" else TOP - 3
    words = escape(f"{clock(mark.at_s)} {mark.words}")
    return f'<line class="mark {mark.kind}" x1="{x:.1f}" x2="{x:.1f}" y1="3" y2="{foot}"><title>{words}</title></line>'


def scaled(values: Sequence[float | None], by: Callable[[float], float]) -> list[float | None]:
    """In another unit."""
    return [None if value is None else by(value) for value in values]
