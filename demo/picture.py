"""Draws the show on one time axis: replicas, requests, latency, and what happened when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cluster.slo import Slo
from workloads.client import Load
from workloads.plot import BLUE, GREEN, GREY, INK, ORANGE, RED, Mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BIN_S = 5.0
ROLE_COLOURS = {"prefill": ORANGE, "decode": BLUE, "mixed": GREEN}

Counts = Mapping[str, Sequence[tuple[float, int, int]]]
"""By role: time, replicas READY, replicas wanted."""


def draw(load: Load, slo: Slo, counts: Counts, marks: Sequence[Mark], path: Path, title: str) -> None:
    """Write a PNG."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10}
    with mpl.rc_context(style):
        figure = Figure(figsize=(13, 10), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(4, 1, sharex=True, height_ratios=(1.5, 1, 1, 1))
        _replicas(axes[0], counts)
        _rates(axes[1], load)
        _latency(axes[2], load, "TTFT", slo.ttft_s, lambda timing: timing.ttft_s)
        _latency(axes[3], load, "TPOT", slo.tpot_s, lambda timing: timing.tpot_s)
        for axis in axes:
            for mark in marks:
                axis.axvline(mark.at_s, color=RED if mark.label.startswith("kill") else GREY, linestyle=":", linewidth=1.3)
        _label(axes[0], marks)
        axes[-1].set_xlabel("time (s); latencies by arrival")
        axes[-1].set_xlim(0, max(load.elapsed_s, 1.0))
        figure.suptitle(title, fontweight="bold", fontsize=13)
        figure.savefig(path)


def _replicas(axis: Axes, counts: Counts) -> None:
    for role, points in counts.items():
        at_s, ready, wanted = np.array(points).T
        colour = ROLE_COLOURS[role]
        axis.step(at_s, wanted, where="post", color=colour, linestyle="--", linewidth=1.2, label=f"{role} wanted")
        axis.step(at_s, ready, where="post", color=colour, linewidth=2.4, label=f"{role} ready")
    axis.set_ylim(0, 1.9 * max(wanted for points in counts.values() for _, _, wanted in points))
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("replicas")
    axis.legend(loc="lower right", ncols=4, frameon=False, fontsize=9, bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


def _rates(axis: Axes, load: Load) -> None:
    edges = np.arange(0.0, load.elapsed_s + BIN_S, BIN_S)
    arrived = np.histogram([sample.timing.arrival_s for sample in load.samples], edges)[0] / BIN_S
    done = np.histogram([sample.end_s for sample in load.samples if sample.timing.completed], edges)[0] / BIN_S
    axis.stairs(arrived, edges, fill=True, color=BLUE, alpha=0.25, label="offered")
    axis.stairs(done, edges, color=BLUE, linewidth=1.6, label="completed")
    axis.set_ylabel("requests/s")
    axis.legend(loc="upper right", ncols=2, frameon=False, fontsize=9)


def _latency(axis: Axes, load: Load, name: str, bound_s: float | None, value: object) -> None:
    points = [(sample.timing.arrival_s, value(sample.timing)) for sample in load.samples if sample.timing.completed]
    points = [(at_s, seconds) for at_s, seconds in points if seconds is not None]
    at_s, seconds = np.array(points).T
    axis.scatter(at_s, 1000 * seconds, s=9, color=BLUE, alpha=0.45, linewidths=0)
    if bound_s is not None:
        axis.axhline(1000 * bound_s, color=RED, linestyle="--", linewidth=1.2, label=f"SLO {1000 * bound_s:,.0f} ms")
        axis.legend(loc="upper right", frameon=False, fontsize=9)
    axis.set_ylim(bottom=0)
    axis.set_ylabel(f"{name} (ms)")


def _label(axis: Axes, marks: Sequence[Mark]) -> None:
    """One under the other, so that those that are close do not cover each other."""
    for number, mark in enumerate(marks):
        place = {"xy": (mark.at_s, 0.97 - 0.075 * (number % 6)), "xycoords": axis.get_xaxis_transform()}
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0}
        axis.annotate(mark.label, **place, xytext=(3, 0), textcoords="offset points", va="top", fontsize=8, color=INK, bbox=box)
