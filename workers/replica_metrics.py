"""Replicas' loads as Prometheus metrics: read when scraped, free otherwise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from cluster.metrics import REPLICA_METRICS, exporter
from workers.replica import HostedReplica


class ReplicaMetrics(Collector):
    """Yields nothing itself: registered first, it brings the table's collectors up to date before they are read."""

    def __init__(self, replicas: Mapping[str, HostedReplica]) -> None:
        """replicas: by id; they may come, go and change their role."""
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._replicas = replicas
        self._told: defaultdict[tuple[str, ...], float] = defaultdict(float)
        self._shown: dict[str, str] = {}
        self._collectors: Mapping[str, Any] = exporter(REPLICA_METRICS, self.registry)

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> list[Any]:
        present = dict(self._replicas)
        for name, role in list(self._shown.items()):
            if name not in present or present[name].plan.group.role.value != role:
                self._forget(name, role)
        for name, replica in present.items():
            self._shown[name] = replica.plan.group.role.value
            self._refresh(replica)
        return []

    def _forget(self, name: str, role: str) -> None:
        """What left, or plays another role now, is not shown as it was."""
        del self._shown[name]
        for collector in self._collectors.values():
            collector.remove_by_labels({"replica": name, "role": role})
        self._told = defaultdict(float, {key: total for key, total in self._told.items() if key[1] != name})

    def _refresh(self, replica: HostedReplica) -> None:
        load, limits, decode = replica.engine.load(), replica.engine.limits, replica.decode
        labels = (replica.replica_id, replica.plan.group.role.value)
        for name, value in (
            ("running", load.running),
            ("waiting", load.waiting + replica.pulling),
            ("kv_blocks_used", load.kv_blocks_used),
            ("kv_blocks_cached", load.kv_blocks_cached),
            ("kv_blocks", limits.kv_blocks),
            ("power_watts", load.power_w),
        ):
            self._collectors[f"mobula_replica_{name}"].labels(*labels).set(value)
        for name, value in (
            ("steps", load.steps),
            ("overrun_steps", load.overrun_steps),
            ("prompt_tokens", load.prompt_tokens),
            ("cached_tokens", load.cached_tokens),
            ("output_tokens", load.output_tokens),
            ("preemptions", load.preemptions),
        ):
            self._count(name, labels, value)
        if decode is not None:
            self._count("transfers", (*labels, "complete"), decode.transfers)
            self._count("transfers", (*labels, "recomputed"), decode.transfers_recomputed)
            self._count("transfer_bytes", labels, decode.transfer_bytes)

    def _count(self, name: str, labels: tuple[str, ...], total: float) -> None:
        """Engines count since their start; a Prometheus counter takes what was added."""
        key = (name, *labels)
        self._collectors[f"mobula_replica_{name}_total"].labels(*labels).inc(max(total - self._told[key], 0.0))
        self._told[key] = total
