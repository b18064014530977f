"""Sums a run up: percentiles, rates, goodput under an SLO, and errors by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cluster.slo import Slo, goodput_rps, meets
from workloads.client import Load, Sample

if TYPE_CHECKING:
    from rich.console import Group


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """In seconds, linearly interpolated."""

    count: int
    p50: float
    p90: float
    p99: float
    max: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a run amounted to. Latencies are those of completed requests; None where there was none."""

    workload: str
    """What was sent: trace or generator, which part of it, how scaled."""
    target: str
    """Model and server it was sent to."""
    requests: int
    completed: int
    rejected: int
    """Answered 429."""
    failed: int
    """Any other error."""
    elapsed_s: float
    offered_rps: float
    """Requests over the time in which they were scheduled."""
    completed_rps: float
    """Completed requests over the whole run."""
    prompt_tokens: int
    """As the server counted, else as the trace says."""
    cached_tokens: int
    output_tokens: int
    output_tokens_asked: int
    output_tokens_per_s: float
    ttft_s: Percentiles | None
    tpot_s: Percentiles | None
    itl_s: Percentiles | None
    e2e_s: Percentiles | None
    send_lag_s: Percentiles | None
    """How late requests were sent; part of TTFT and E2E."""
    slo: Slo
    slo_met: int
    """Requests that met their whole SLO."""
    goodput_rps: float
    errors: dict[str, int]
    peak_in_flight: int
    held: int
    """Requests sent late because as many as allowed were in flight."""


def summarise(load: Load, slo: Slo, *, workload: str, target: str) -> Report:
    """The report of a run that has ended."""
    samples = load.samples
    timings = [sample.timing for sample in samples]
    done = [timing for timing in timings if timing.completed]
    errors = Counter(timing.error or "no token" for timing in timings if not timing.completed)
    rejected = errors.get("rejected (429)", 0)
    elapsed_s = max(load.elapsed_s, 1e-9)
    arrivals = [timing.arrival_s for timing in timings]
    span_s = (max(arrivals) - min(arrivals) if arrivals else 0.0) or elapsed_s
    output_tokens = sum(timing.output_tokens for timing in timings)
    return Report(
        workload=workload,
        target=target,
        requests=len(samples),
        completed=len(done),
        rejected=rejected,
        failed=len(samples) - len(done) - rejected,
        elapsed_s=load.elapsed_s,
        offered_rps=len(samples) / span_s,
        completed_rps=len(done) / elapsed_s,
        prompt_tokens=sum(_prompt_tokens(sample) for sample in samples if sample.timing.completed),
        cached_tokens=sum(sample.cached_tokens for sample in samples),
        output_tokens=output_tokens,
        output_tokens_asked=sum(max(1, sample.row.output_tokens) for sample in samples),
        output_tokens_per_s=output_tokens / elapsed_s,
        ttft_s=percentiles(timing.ttft_s for timing in done),
        tpot_s=percentiles(timing.tpot_s for timing in done),
        itl_s=percentiles(gap for timing in done for gap in timing.itl_s),
        e2e_s=percentiles(timing.e2e_s for timing in done),
        send_lag_s=percentiles(sample.send_lag_s for sample in samples),
        slo=slo,
        slo_met=sum(meets(timing, slo) for timing in timings),
        goodput_rps=goodput_rps(timings, slo, elapsed_s),
        errors=dict(errors.most_common()),
        peak_in_flight=load.peak_in_flight,
        held=load.held,
    )


def _prompt_tokens(sample: Sample) -> int:
    """As the server counted them, where it did."""
    return sample.row.prompt_tokens if sample.prompt_tokens is None else sample.prompt_tokens


def percentiles(values: Iterable[float | None]) -> Percentiles | None:
    """Of the values that are there; None without any."""
    array = np.array([value for value in values if value is not None])
    if not len(array):
        return None
    p50, p90, p99, top = np.percentile(array, [50, 90, 99, 100]).tolist()
    return Percentiles(count=len(array), p50=p50, p90=p90, p99=p99, max=top)


def render(report: Report) -> Group:
    """The report for people, for a rich console."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    latency = Table(title="Latency of completed requests (ms)", title_justify="left")
    for column in ("", "P50", "P90", "P99", "max", "SLO"):
        latency.add_column(column, justify="left" if not column else "right")
    bounds = {"TTFT": report.slo.ttft_s, "TPOT": report.slo.tpot_s, "E2E": report.slo.e2e_s}
    rows = {"TTFT": report.ttft_s, "TPOT": report.tpot_s, "ITL": report.itl_s, "E2E": report.e2e_s, "send lag": report.send_lag_s}
    for name, row in rows.items():
        cells = [f"{1e3 * value:,.1f}" for value in (row.p50, row.p90, row.p99, row.max)] if row else ["-"] * 4
        bound = bounds.get(name)
        latency.add_row(name, *cells, "" if bound is None else f"{1e3 * bound:,.0f}")

    totals = Table(show_header=False, title="Requests", title_justify="left")
    totals.add_column()
    totals.add_column(justify="right")
    totals.add_row("offered", f"{report.requests} ({report.offered_rps:.2f}/s)")
    totals.add_row("completed", f"{report.completed} ({report.completed_rps:.2f}/s over {report.elapsed_s:.1f} s)")
    totals.add_row("output tokens", f"{report.output_tokens} of {report.output_tokens_asked} ({report.output_tokens_per_s:.0f}/s)")
    totals.add_row("prompt tokens", f"{report.prompt_tokens} ({report.cached_tokens} cached)")
    share = report.slo_met / report.requests if report.requests else 0.0
    totals.add_row("goodput under the SLO", f"{report.goodput_rps:.2f}/s ({share:.1%} of requests)")
    totals.add_row("peak in flight", str(report.peak_in_flight))
    if report.held:
        totals.add_row("[yellow]sent late at the in-flight bound[/]", f"[yellow]{report.held}[/]")
    for kind, count in report.errors.items():
        totals.add_row(f"[red]{kind}[/]", f"[red]{count}[/]")
    return Group(Text(f"{report.workload}, on {report.target}"), totals, latency)
