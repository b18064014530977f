from __future__ import annotations

import re

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from cluster.metrics import CONTROLLER_METRICS, DEMAND_NAMES, GATEWAY_METRICS, REPLICA_METRICS, Metric, Sample, exporter, samples

ALL = (*GATEWAY_METRICS, *REPLICA_METRICS, *CONTROLLER_METRICS)
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


def test_samples_are_named_as_prometheus_names_them() -> None:
    registry = CollectorRegistry()
    made = exporter((Metric("mobula_x_total", "counter", "X.", ("model", "tenant")),), registry)
    made["mobula_x_total"].labels("n", "").inc(3)
    made["mobula_x_total"].labels("m", "t").inc()
    assert samples(registry, {"mobula_x_total"}, instance="a:1") == (
        Sample("mobula_x_total", (("instance", "a:1"), ("model", "m"), ("tenant", "t")), 1.0),
        Sample("mobula_x_total", (("instance", "a:1"), ("model", "n")), 3.0),
    )


def test_a_controller_reads_nothing_that_grows_with_tenants() -> None:
    registry = CollectorRegistry()
    made = exporter(GATEWAY_METRICS, registry)
    for metric in GATEWAY_METRICS:
        for tenant in ("one", "other") if metric.labels else ():
            made[metric.name].labels(*(tenant if label in ("tenant", "key") else "m" for label in metric.labels))
    found = samples(registry, DEMAND_NAMES)
    assert {one.name for one in found} == set(DEMAND_NAMES)
    assert {name for one in found for name, _ in one.labels} == {"model", "le"}
