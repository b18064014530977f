"""How near simulated latencies come to what clients of a live fleet saw: quantiles side by side, and their relative errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np
from rich.table import Table

from cluster.errors import InvalidTrace
from cluster.slo import RequestTiming

QUANTILES = (0.5, 0.9)
"""Of TTFT and TPOT each: what published simulators state their errors for."""


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """Of one run, live and simulated, by figure: `ttft_p50_s` and the like."""

    name: str
    requests: int
    live_s: Mapping[str, float]
    simulated_s: Mapping[str, float]

    @property
    def errors(self) -> dict[str, float]:
        """Simulated over live, less 1: 0.03 is 3 % too slow."""
        return {figure: self.simulated_s[figure] / live_s - 1.0 for figure, live_s in self.live_s.items()}

    @property
    def mean_error(self) -> float:
        """Of the errors' absolute values."""
        return float(np.mean(np.abs(list(self.errors.values()))))


def agreement(
    name: str, live: Sequence[RequestTiming], simulated: Sequence[RequestTiming], quantiles: Sequence[float] = QUANTILES
) -> Agreement:
    """Of the requests that completed on either side. Raises InvalidTrace where one side has none, or no request of two tokens."""
    done = [timing for timing in live if timing.completed]
    return Agreement(
        name=name,
        requests=len(done),
        live_s=figures(f"{name}, live", done, quantiles),
        simulated_s=figures(f"{name}, simulated", [timing for timing in simulated if timing.completed], quantiles),
    )


def figures(name: str, timings: Iterable[RequestTiming], quantiles: Sequence[float]) -> dict[str, float]:
    """Quantiles of TTFT and TPOT in seconds, linearly interpolated."""
    timings = list(timings)
    found: dict[str, float] = {}
    for metric, values in (("ttft", [one.ttft_s for one in timings]), ("tpot", [one.tpot_s for one in timings])):
        known = [value for value in values if value is not None]
        if not known:
            raise InvalidTrace(f"{name}: none of {len(timings)} completed requests has a {metric}")
        there = np.quantile(known, quantiles).tolist()
        found |= {f"{metric}_p{100 * share:g}_s": value for share, value in zip(quantiles, there, strict=True)}
    return found


def mean_error(found: Sequence[Agreement]) -> float:
    """Of all figures of all runs, each as weighty as the next."""
    return float(np.mean([abs(error) for one in found for error in one.errors.values()]))


def table(title: str, found: Sequence[Agreement]) -> Table:
    """Live, simulated and error of every figure, in milliseconds."""
    shown = Table(title=title, title_justify="left")
    for column in ("", "requests", "", *found[0].live_s, "mean error"):
        shown.add_column(_heading(column), justify="left" if not column else "right")
    for one in found:
        errors = one.errors
        shown.add_row(one.name, f"{one.requests}", "live", *(f"{1e3 * value:,.2f}" for value in one.live_s.values()), "")
        shown.add_row("", "", "simulated", *(f"{1e3 * one.simulated_s[figure]:,.2f}" for figure in one.live_s), "")
        shown.add_row(
            "", "", "error", *(f"{errors[figure]:+.1%}" for figure in one.live_s), f"{one.mean_error:.1%}", end_section=True
        )
    return shown


def _heading(figure: str) -> str:
    """`ttft_p50_s` as people read it."""
    metric, _, share = figure.removesuffix("_s").partition("_")
    return f"{metric.upper()} {share.upper()} ms" if share else figure
