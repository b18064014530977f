"""The report's numbers are those of the samples."""

import io

import msgspec
import numpy as np
import pytest
from rich.console import Console

from cluster.record import TraceRow
from cluster.slo import RequestTiming, Slo
from workloads.client import Load, Sample
from workloads.plot import Mark, plot
from workloads.report import Report, render, summarise

SLO = Slo(ttft_s=0.5, tpot_s=0.1)


def sample(arrival_s, ttft_s, gaps, error=None):
    first_s = arrival_s + ttft_s
    last_s = first_s + sum(gaps)
    timing = RequestTiming(
        arrival_s=arrival_s, first_token_s=first_s, last_token_s=last_s, output_tokens=len(gaps) + 1, itl_s=gaps, error=error
    )
    row = TraceRow(arrival_s=arrival_s, prompt_tokens=10, output_tokens=5)
    return Sample(row=row, timing=timing, send_lag_s=0.001, end_s=last_s, prompt_tokens=11, cached_tokens=4)


def loaded(*samples, elapsed_s=10.0):
    load = Load()
    load.samples, load.elapsed_s, load.peak_in_flight = list(samples), elapsed_s, 3
    return load


def summed(load):
    return summarise(load, SLO, workload="trace.csv, whole", target="tiny at a server")


def test_percentiles_are_numpys():
    ttfts = np.random.default_rng(0).exponential(0.3, 200)
    report = summed(loaded(*(sample(i * 0.05, ttft, (0.02, 0.04)) for i, ttft in enumerate(ttfts))))
    found = (report.ttft_s.p50, report.ttft_s.p90, report.ttft_s.p99, report.ttft_s.max)
    assert found == pytest.approx(np.percentile(ttfts, [50, 90, 99, 100]))
    assert (report.itl_s.count, report.tpot_s.p50) == (400, pytest.approx(0.03))


def test_goodput_counts_only_requests_that_met_every_bound():
    load = loaded(
        sample(0, 0.1, (0.01,)), sample(1, 0.9, (0.01,)), sample(2, 0.1, (0.5,)), sample(3, 0.1, (0.01,), error="disconnected")
    )
    report = summed(load)
    assert (report.slo_met, report.goodput_rps) == (1, pytest.approx(0.1))
    assert (report.requests, report.completed, report.failed) == (4, 3, 1)


def test_errors_are_counted_by_kind_and_rejections_apart():
    errors = ("rejected (429)", "rejected (429)", "timeout", None)
    report = summed(loaded(*(sample(i, 0.1, (), error) for i, error in enumerate(errors))))
    assert report.errors == {"rejected (429)": 2, "timeout": 1}
    assert (report.rejected, report.failed, report.completed) == (2, 1, 1)


def test_rates_and_tokens():
    report = summed(loaded(sample(0, 0.1, (0.1,) * 3), sample(5, 0.1, (0.1,) * 3)))
    assert (report.offered_rps, report.completed_rps, report.output_tokens_per_s) == (0.4, 0.2, 0.8)
    assert (report.prompt_tokens, report.cached_tokens, report.output_tokens, report.output_tokens_asked) == (22, 8, 8, 10)


def test_a_run_without_requests_has_a_report():
    report = summed(loaded(elapsed_s=0.0))
    assert (report.requests, report.ttft_s, report.goodput_rps) == (0, None, 0.0)
    Console(file=io.StringIO()).print(render(report))


def test_the_report_is_json_and_a_table():
    report = summed(loaded(sample(0, 0.1, (0.01,)), sample(1, 0.1, (), error="timeout")))
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report
    out = io.StringIO()
    Console(file=out, width=120).print(render(report))
    assert "trace.csv, whole, on tiny at a server" in out.getvalue()
    assert all(word in out.getvalue() for word in ("TTFT", "P99", "100.0", "timeout", "goodput"))


@pytest.mark.parametrize("count", [0, 1, 30])
def test_a_run_can_be_drawn(tmp_path, count):
    samples = [sample(i / 3, 0.1 + i / 50, (0.02,) * (i % 3), "timeout" if i == 7 else None) for i in range(count)]
    plot(loaded(*samples), SLO, tmp_path / "run.png", title="run", marks=[Mark(5.0, "kill worker")])
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
