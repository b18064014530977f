"""Snapshots in one line, for tests of policies."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.hardware import ACCELERATORS
from cluster.models import MODELS
from cluster.node import Node
from cluster.performance import roofline
from cluster.replica import Load, Phase, Role
from cluster.slo import Slo
from cluster.snapshot import ClusterSnapshot, Demand, Group, ReplicaState, Workload

H100_8B = roofline(MODELS["llama-3.1-8b"], ACCELERATORS["h100"])
SLO = Slo(ttft_s=1.0, tpot_s=0.03)
BUCKET_S = 5.0
NOW_S = 1_000_000.0


def group(role: Role = Role.MIXED, wanted: int = 1, **more: object) -> Group:
    fields = {
        "model": "m",
        "pool": "p",
        "min_replicas": 0 if role is Role.PREFILL else 1,
        "max_replicas": 64,
        "performance": H100_8B,
        "kv_tokens": 480_000,
        "max_running": 128,
        "step_budget_tokens": 1024,
        "startup_s": 40.0,
    }
    return Group(role=role, wanted=wanted, **{**fields, **more})


def demand(rate_rps: float, prompt: float = 1000.0, output: float = 200.0) -> Demand:
    count = rate_rps * BUCKET_S
    return Demand(
        requests=count,
        prompt_tokens=count * prompt,
        prompt_tokens_squared=count * prompt * prompt * 1.5,
        output_tokens=count * output,
    )


def workload(rates_rps: Sequence[float], prompt: float = 1000.0, output: float = 200.0, **more: object) -> Workload:
    buckets = tuple(demand(rate, prompt, output) for rate in rates_rps)
    return Workload(**{"model": "m", "slo": SLO, "bucket_s": BUCKET_S, "buckets": buckets, **more})


def steady(rate_rps: float, **more: object) -> Workload:
    return workload([rate_rps] * 60, **more)


def replica(
    replica_id: str, of: Group, phase: Phase = Phase.READY, node: str = "n0", kv_blocks: int = 0, **more: object
) -> ReplicaState:
    load = Load(
        replica_id=replica_id,
        sequence=1,
        at_s=NOW_S,
        phase=phase,
        running=0,
        waiting=0,
        waiting_tokens=0,
        kv_tokens=0,
        kv_blocks_used=kv_blocks,
    )
    fields = {"group": of.name, "role": of.role, "phase_since_s": NOW_S - 100.0, "load": load}
    return ReplicaState(replica_id=replica_id, phase=phase, node=node, **{**fields, **more})


def cluster(groups: Sequence[Group], workloads: Sequence[Workload] = (), **more: object) -> ClusterSnapshot:
    """Every group has its wanted replicas, READY, spread over 16 nodes of 8 places."""
    nodes = tuple(Node(name=f"n{number}", pool="p", slots=8) for number in range(16))
    members = [
        replica(f"{one.role.value}-p-{index}", one, node=f"n{(index + turn) % 16}")
        for turn, one in enumerate(groups)
        for index in range(one.wanted)
    ]
    fields = {
        "now_s": NOW_S,
        "nodes": nodes,
        "replicas": tuple(sorted(members, key=lambda one: one.replica_id)),
        "next_replica": 1000,
    }
    return ClusterSnapshot(groups=tuple(groups), workloads=tuple(workloads), **{**fields, **more})
