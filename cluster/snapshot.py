"""The cluster at one instant, as one immutable value: all that a policy may know, its memory included.

Times are Unix seconds; ages are seconds before `now_s`. Tuples are in the order of their names, so that equal clusters are equal
values and make equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import msgspec

from cluster.node import Node
from cluster.performance import PerformanceModel
from cluster.placement import group_name
from cluster.replica import Load, Phase, Role
from cluster.slo import Slo


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Replicas that are scaled as one: a model in a role on a pool, and what the controller remembers of them."""

    model: str
    revision: str = ""
    role: Role
    pool: str
    build: str = ""
    """Groups of one build differ in their role alone: a replica of one can become one of the other."""
    min_replicas: int
    max_replicas: int
    wanted: int
    """The target in force: the last one applied."""
    performance: PerformanceModel | None
    """Of one replica, as predicted; None before the first has said what it is."""
    slowdown: float = 1.0
    """Measured over predicted step time, > 0."""
    kv_tokens: int
    """KV capacity of one replica, in tokens."""
    max_running: int
    step_budget_tokens: int
    startup_s: float
    """Start to READY: measured, or the config's assumption before the first start."""
    changed_up_s: float | None = None
    """When the target last rose; None if it never did."""
    changed_down_s: float | None = None

    @property
    def name(self) -> str:
        """As claims, reasons and operators call it."""
        return group_name(self.model, self.role, self.pool)


class ReplicaState(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One replica and the last that was heard of it."""

    replica_id: str
    group: str
    """The group's name."""
    role: Role
    phase: Phase
    node: str
    phase_since_s: float
    ready_since_s: float | None = None
    """None before it was READY for the first time in its role."""
    load: Load | None = None
    """None before its first report."""
    load_age_s: float = 0.0

    @property
    def present(self) -> bool:
        """Whether it counts against its group's target: it serves, or will."""
        return self.phase in (Phase.STARTING, Phase.WARMING, Phase.READY)


class Demand(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Sums over what happened in one bucket of time. Second moments tell how uneven it was."""

    requests: float = 0.0
    prompt_tokens: float = 0.0
    """Not found in a prefix cache."""
    prompt_tokens_squared: float = 0.0
    cached_tokens: float = 0.0
    output_tokens: float = 0.0
    """Expected of the requests that arrived: their count times the running mean of those that ended."""


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Measured quantiles over the window, in seconds."""

    p50_s: float
    p90_s: float
    p99_s: float


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of one model, and how it fares."""

    model: str
    slo: Slo
    bucket_s: float
    buckets: tuple[Demand, ...]
    """Oldest first; the last one ends `age_s` ago."""
    age_s: float = 0.0
    queued: int = 0
    """Requests in gateways that wait for a replica with room."""
    in_flight: int = 0
    ttft: Latency | None = None
    """None where nothing ended in the window."""
    tpot: Latency | None = None
    attainment: float | None = None
    """Share of ended requests inside their SLO."""


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """An operator's hand on the controls."""

    kind: Literal["pause", "cordon", "drain", "pin"]
    target: str = ""
    """A node's name for cordon and drain, a group's for pin, nothing for pause."""
    replicas: int | None = None
    """Of a pin."""
    author: str
    expires_s: float


class FailedStart(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that was started and never became READY."""

    group: str
    node: str
    at_s: float


class ClusterSnapshot(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Everything, at `now_s`."""

    now_s: float
    pass_number: int = 0
    next_replica: int = 0
    """Numbers below it have named a replica before and are never given again."""
    nodes: tuple[Node, ...] = ()
    groups: tuple[Group, ...] = ()
    replicas: tuple[ReplicaState, ...] = ()
    workloads: tuple[Workload, ...] = ()
    holds: tuple[Hold, ...] = ()
    """Those that have not expired."""
    failed_starts: tuple[FailedStart, ...] = ()
    """Recent ones, oldest first."""

    @cached_property
    def node_by_name(self) -> Mapping[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def group_by_name(self) -> Mapping[str, Group]:
        return {group.name: group for group in self.groups}

    @cached_property
    def workload_by_model(self) -> Mapping[str, Workload]:
        return {workload.model: workload for workload in self.workloads}

    @cached_property
    def replica_by_id(self) -> Mapping[str, ReplicaState]:
        return {replica.replica_id: replica for replica in self.replicas}

    @cached_property
    def replicas_by_group(self) -> Mapping[str, tuple[ReplicaState, ...]]:
        """Every group has an entry."""
        found: dict[str, list[ReplicaState]] = {group.name: [] for group in self.groups}
        for replica in self.replicas:
            found.setdefault(replica.group, []).append(replica)
        return {name: tuple(replicas) for name, replicas in found.items()}

    @cached_property
    def free_slots(self) -> Mapping[str, int]:
        """Replicas that each living node has room for. A draining replica still takes its place."""
        taken = dict.fromkeys(self.node_by_name, 0)
        for replica in self.replicas:
            if replica.node in taken and replica.phase not in (Phase.STOPPED, Phase.LOST):
                taken[replica.node] += 1
        return {node.name: max(0, node.slots - taken[node.name]) for node in self.nodes if node.alive}

    @cached_property
    def drained(self) -> frozenset[str]:
        """Nodes that are to be emptied, by an operator's word."""
        return frozenset(hold.target for hold in self.holds if hold.kind == "drain")

    @cached_property
    def cordoned(self) -> frozenset[str]:
        """Nodes that take no new replica, by an operator's word."""
        return frozenset(hold.target for hold in self.holds if hold.kind in ("cordon", "drain"))
