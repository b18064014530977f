"""The controller's metrics say what its passes did."""

from collections.abc import Mapping

import msgspec

from cluster.actions import Decision, Dropped, Reason, ScaleRole, StartReplica
from cluster.metrics import CONTROLLER_METRICS, samples
from cluster.replica import Phase, Role
from cluster.snapshot import Hold
from controller.observe.exporter import ControllerMetrics, Tallies
from tests.controller.test_assemble import build, counters, member

WHY = Reason(text="why")
START = StartReplica(replica_id="d2", group="m/decode/p", node="a", reason=WHY)
DECISION = Decision(
    targets={"m/decode/p": 3},
    actions=(START,),
    dropped=(Dropped(action=ScaleRole(group="m/prefill/q", replicas=9, reason=WHY), by="Capacity", why="no room"),),
)


def told(metrics: ControllerMetrics) -> Mapping[tuple[str, ...], float]:
    """By name and values of the labels."""
    names = {metric.name for metric in CONTROLLER_METRICS}
    return {(one.name, *(value for _, value in one.labels)): one.value for one in samples(metrics.registry, names)}


def snapshot():
    replicas = [member("d0"), member("d1", phase=Phase.DRAINING), member("f0", Role.PREFILL, "b")]
    holds = (Hold(kind="pause", author="me", expires_s=2e9),)
    return msgspec.structs.replace(build(replicas, telemetry=counters(4.0), alive=("a",)), holds=holds)


def test_a_pass_is_told():
    metrics = ControllerMetrics(7, Tallies)
    metrics.passed(snapshot(), DECISION, 0.02)
    found = told(metrics)
    expected = {
        ("mobula_controller_epoch",): 7,
        ("mobula_controller_passes_total",): 1,
        ("mobula_controller_actions_total", "StartReplica"): 1,
        ("mobula_controller_dropped_total", "Capacity"): 1,
        ("mobula_controller_holds", "pause"): 1,
        ("mobula_controller_telemetry_age_seconds", "m"): 0.0,
        ("mobula_replicas_wanted", "m/decode/p"): 3,
        ("mobula_replicas_wanted", "m/prefill/q"): 1,
        ("mobula_replicas", "m/decode/p", "ready"): 1,
        ("mobula_replicas", "m/decode/p", "draining"): 1,
        ("mobula_replicas", "m/decode/p", "starting"): 0,
        ("mobula_replicas", "m/prefill/q", "ready"): 1,
        ("mobula_nodes", "true"): 1,
        ("mobula_nodes", "false"): 1,
        ("mobula_price_usd_per_hour",): 3.0,
    }
    assert {key: found[key] for key in expected} == expected


def test_what_is_gone_is_told_no_more():
    metrics = ControllerMetrics(1, Tallies)
    metrics.passed(snapshot(), DECISION, 0.02)
    metrics.passed(msgspec.structs.replace(snapshot(), groups=(), replicas=(), holds=(), workloads=()), Decision(), 0.02)
    found = told(metrics)
    assert found["mobula_controller_passes_total",] == 2
    assert not {name for name, *labels in found if labels} & {
        "mobula_replicas",
        "mobula_replicas_wanted",
        "mobula_controller_holds",
        "mobula_controller_telemetry_age_seconds",
    }


def test_tallies_are_as_of_the_scrape_even_when_no_pass_succeeds():
    tallies = [Tallies(failures=2, journal_bytes=10), Tallies(failures=5, heartbeats_lost=1, journal_bytes=4)]
    metrics = ControllerMetrics(1, lambda: tallies.pop(0))
    names = ("failures_total", "heartbeats_lost_total", "journal_bytes")

    def scraped() -> list[float]:
        found = {family.name: family for family in metrics.registry.collect()}
        by_name = {one.name: one.value for family in found.values() for one in family.samples}
        return [by_name[f"mobula_controller_{name}"] for name in names]

    assert scraped() == [2, 0, 10]
    assert scraped() == [5, 1, 4]
