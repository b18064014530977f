from __future__ import annotations

import re

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from cluster.metrics import GATEWAY_METRICS, REPLICA_METRICS, Metric, exporter

ALL = (*GATEWAY_METRICS, *REPLICA_METRICS)
UNITS_NOT_BASE = re.compile(r"_(ms|us|milliseconds|microseconds|kb|mb|kw|minutes)(_|$)")


def test_names_are_unique() -> None:
    assert len({metric.name for metric in ALL}) == len(ALL)


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name)
def test_names_follow_prometheus_conventions(metric: Metric) -> None:
    assert re.fullmatch(r"mobula_[a-z][a-z0-9_]*", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not UNITS_NOT_BASE.search(metric.name), "base units: seconds, bytes, watts, tokens"
    assert metric.help.endswith(".")
    assert len(set(metric.labels)) == len(metric.labels)


@pytest.mark.parametrize("metric", [metric for metric in ALL if metric.kind == "histogram"], ids=lambda metric: metric.name)
def test_histograms_end_in_their_unit_and_their_buckets_rise(metric: Metric) -> None:
    assert metric.name.endswith(("_seconds", "_tokens", "_bytes"))
    assert list(metric.buckets) == sorted(set(metric.buckets))


def test_the_exporter_makes_every_row() -> None:
    registry = CollectorRegistry()
    made = exporter(ALL, registry)
    assert set(made) == {metric.name for metric in ALL}
    made["mobula_replica_power_watts"].labels(replica="r", role="mixed").set(71.5)  # type: ignore[union-attr]
    assert b'mobula_replica_power_watts{replica="r",role="mixed"} 71.5' in generate_latest(registry)
