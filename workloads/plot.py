"""Draws a run: rates and requests in flight, TTFT and TPOT over time, and their distributions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cluster.slo import RequestTiming, Slo
from workloads.client import Load, Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, RED, GREY, INK = "#2864b4", "#e08a1e", "#2e9e6b", "#c8323c", "#6b7280", "#1f2937"
BINS = 60
LEAST_MS = 0.1  # A log scale has no 0.
HEADROOM = 1.1  # Above the highest value, for the labels of marks.
ABOVE = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 5, "frameon": False, "fontsize": 9, "borderaxespad": 0.2}
ABOVE |= {"columnspacing": 1.2, "handlelength": 1.4}


class Mark(msgspec.Struct, frozen=True):
    """Something that happened during the run."""

    at_s: float
    label: str


def plot(load: Load, slo: Slo, path: str | Path, *, title: str = "", marks: Sequence[Mark] = ()) -> None:
    """Write a PNG of a run that has ended."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10}
    with mpl.rc_context(style):
        figure = Figure(figsize=(13, 8), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2)
        _rates(axes[0, 0], load)
        _latency(axes[0, 1], load, "TTFT", lambda timing: timing.ttft_s, slo.ttft_s)
        _latency(axes[1, 0], load, "TPOT", lambda timing: timing.tpot_s, slo.tpot_s)
        _distributions(axes[1, 1], load, slo)
        for axis in axes.flat[:3]:
            axis.set_xlim(0, max(load.elapsed_s, 1e-3))
            axis.set_xlabel("time (s), latencies by arrival")
            _draw_marks(axis, marks)
        if title:
            figure.suptitle(title, fontweight="bold", fontsize=13)
        figure.savefig(path)


def _rates(axis: Axes, load: Load) -> None:
    edges = np.linspace(0, max(load.elapsed_s, 1e-3), BINS + 1)
    width_s = edges[1]
    arrived = np.histogram([sample.timing.arrival_s for sample in load.samples], edges)[0] / width_s
    done = np.histogram([sample.end_s for sample in load.samples if sample.timing.completed], edges)[0] / width_s
    axis.stairs(arrived, edges, fill=True, color=BLUE, alpha=0.25, label="offered")
    axis.stairs(done, edges, color=BLUE, linewidth=1.6, label="completed")
    axis.set_ylabel("requests/s")
    axis.set_title("Load", loc="left", fontweight="bold")

    right = axis.twinx()
    middles_s = (edges[:-1] + edges[1:]) / 2
    right.plot(middles_s, _peaks_in_flight(load.samples, edges), color=ORANGE, linewidth=1.5, label="peak in flight (right)")
    right.set_ylim(bottom=0)
    right.set_ylabel("requests in flight", color=ORANGE)
    right.yaxis.get_major_locator().set_params(integer=True)
    right.grid(visible=False)
    axis.set_ylim(0, HEADROOM * max(1.0, *arrived, *done))
    handles = [*axis.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    right.legend(handles=handles, **ABOVE)


def _peaks_in_flight(samples: Sequence[Sample], edges: np.ndarray) -> list[int]:
    """The most requests in flight at once, between each two edges."""
    times_s = np.array([s.timing.arrival_s + s.send_lag_s for s in samples] + [s.end_s for s in samples])
    order = np.argsort(times_s, kind="stable")
    levels = np.concatenate([[0], np.cumsum(np.repeat([1, -1], len(samples))[order])])
    places = np.searchsorted(times_s[order], edges, side="right")
    return [int(levels[low : high + 1].max()) for low, high in itertools.pairwise(places)]


def _latency(axis: Axes, load: Load, name: str, value: Callable[[RequestTiming], float | None], bound_s: float | None) -> None:
    points = [(s.timing.arrival_s, value(s.timing)) for s in load.samples if s.timing.completed]
    points = sorted((at, 1e3 * each) for at, each in points if each is not None)
    axis.set_title(name, loc="left", fontweight="bold")
    axis.set_ylabel(f"{name} (ms)")
    if points:
        at_s, values_ms = np.array(points).T
        axis.scatter(at_s, values_ms, s=10, color=BLUE, alpha=0.4, linewidths=0, label="request")
        edges = np.linspace(0, max(load.elapsed_s, 1e-3), BINS // 3 + 1)
        groups = [values_ms[(at_s >= low) & (at_s < high)] for low, high in itertools.pairwise(edges)]
        middles = [(low + high) / 2 for low, high, group in zip(edges, edges[1:], groups, strict=False) if len(group)]
        for percent, color in ((50, GREEN), (90, ORANGE)):
            axis.plot(middles, [np.percentile(group, percent) for group in groups if len(group)], color=color, label=f"P{percent}")
    failed = [s.timing.arrival_s for s in load.samples if not s.timing.completed]
    if failed:
        axis.plot(failed, [0.02] * len(failed), "x", color=RED, transform=axis.get_xaxis_transform(), label="failed")
    if bound_s is not None:
        axis.axhline(1e3 * bound_s, color=RED, linestyle="--", linewidth=1.2, label=f"SLO {1e3 * bound_s:,.0f} ms")
    axis.set_ylim(0, HEADROOM * axis.get_ylim()[1])
    if axis.get_legend_handles_labels()[0]:
        axis.legend(**ABOVE)


def _distributions(axis: Axes, load: Load, slo: Slo) -> None:
    done = [s.timing for s in load.samples if s.timing.completed]
    gaps = [gap for timing in done for gap in timing.itl_s]
    curves = (
        ("TTFT", BLUE, [timing.ttft_s for timing in done], slo.ttft_s),
        ("TPOT", GREEN, [timing.tpot_s for timing in done], slo.tpot_s),
        ("ITL", ORANGE, gaps, None),
        ("E2E", GREY, [timing.e2e_s for timing in done], slo.e2e_s),
    )
    for name, color, values, bound_s in curves:
        values_ms = np.sort([1e3 * value for value in values if value is not None])
        if len(values_ms):
            axis.plot(
                np.maximum(values_ms, LEAST_MS),
                np.arange(1, len(values_ms) + 1) / len(values_ms),
                color=color,
                label=name,
                linewidth=1.6,
            )
        if bound_s is not None:
            axis.axvline(1e3 * bound_s, color=color, linestyle="--", linewidth=1.0, alpha=0.8)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylim(0, 1.01)
    axis.set_xlabel("ms (log scale; dashed: SLO; 0.1: tokens that came together)")
    axis.set_ylabel("share at or below")
    axis.set_title("Distributions", loc="left", fontweight="bold")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(**ABOVE)


def _draw_marks(axis: Axes, marks: Sequence[Mark]) -> None:
    for mark in marks:
        axis.axvline(mark.at_s, color=INK, linestyle=":", linewidth=1.6)
        place = {"xy": (mark.at_s, 1.0), "xycoords": axis.get_xaxis_transform(), "xytext": (4, -2), "textcoords": "offset points"}
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
        axis.annotate(mark.label, **place, va="top", fontsize=9, color=INK, bbox=box)
