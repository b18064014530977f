"""The controller's own metrics: brought up to date after each pass, and where they are scraped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from cluster.actions import Decision
from cluster.metrics import CONTROLLER_METRICS, exporter
from cluster.replica import Phase
from cluster.snapshot import ClusterSnapshot


class Tallies(msgspec.Struct, frozen=True, kw_only=True):
    """What others count since the controller started, and the journal's size."""

    failures: int = 0
    unwritten: int = 0
    telemetry_errors: int = 0
    samples_refused: int = 0
    loads_refused: int = 0
    heartbeats_lost: int = 0
    journal_bytes: int = 0


class ControllerMetrics(Collector):
    """Yields nothing itself: registered first, it brings the tallies up to date before the table's collectors are read."""

    def __init__(self, epoch: int, tallies: Callable[[], Tallies]) -> None:
        """tallies: called for each scrape, on the loop that serves it."""
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._all: Any = exporter(CONTROLLER_METRICS, self.registry)
        self._all["mobula_controller_epoch"].set(epoch)
        self._tallies, self._told = tallies, Tallies()

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> list[Any]:
        tallies = self._tallies()
        for name in ("failures", "unwritten", "telemetry_errors", "samples_refused", "loads_refused", "heartbeats_lost"):
            self._all[f"mobula_controller_{name}_total"].inc(max(0, getattr(tallies, name) - getattr(self._told, name)))
        self._all["mobula_controller_journal_bytes"].set(tallies.journal_bytes)
        self._told = tallies
        return []

    def passed(self, snapshot: ClusterSnapshot, decision: Decision, pass_s: float) -> None:
        """After a pass: what it saw, what it decided, and how many seconds it took."""
        self._all["mobula_controller_passes_total"].inc()
        self._all["mobula_controller_pass_seconds"].observe(pass_s)
        for action in decision.actions:
            self._all["mobula_controller_actions_total"].labels(type(action).__name__).inc()
        for dropped in decision.dropped:
            self._all["mobula_controller_dropped_total"].labels(dropped.by).inc()
        alive = [node for node in snapshot.nodes if node.alive]
        self._gauge("nodes", {("true",): len(alive), ("false",): len(snapshot.nodes) - len(alive)})
        self._all["mobula_price_usd_per_hour"].set(sum(node.price_usd_per_hour for node in alive))
        self._gauge("controller_holds", Counter((hold.kind,) for hold in snapshot.holds))
        self._gauge("controller_telemetry_age_seconds", {(one.model,): one.age_s for one in snapshot.workloads})
        self._replicas(snapshot, decision)

    def _replicas(self, snapshot: ClusterSnapshot, decision: Decision) -> None:
        wanted = {(group.name,): decision.targets.get(group.name, group.wanted) for group in snapshot.groups}
        self._gauge("replicas_wanted", wanted)
        there = {(group.name, phase.value): 0 for group in snapshot.groups for phase in Phase}
        self._gauge("replicas", there | Counter((one.group, one.phase.value) for one in snapshot.replicas))

    def _gauge(self, name: str, values: Any) -> None:
        """Exactly these values, by labels: what is gone from the cluster is gone from its metrics."""
        gauge = self._all[f"mobula_{name}"]
        gauge.clear()
        for labels, value in values.items():
            gauge.labels(*labels).set(value)
