"""Builders of small fleets: one line a replica, a report, a request."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cluster.kv import KvLayout
from cluster.performance import PerformanceModel
from cluster.replica import Load, Phase, Replica, Role
from policies.route import Ask
from policies.routing import PredictedLatencyRouter

PERFORMANCE = PerformanceModel(step_s=0.01, prefill_token_s=1e-4, sequence_s=1e-4, kv_token_s=1e-7)


def replica(replica_id: str, role: Role = Role.MIXED, **changes: object) -> Replica:
    facts: dict[str, object] = {
        "worker_id": f"worker-of-{replica_id}",
        "node": "node",
        "endpoint": "127.0.0.1:1",
        "phase": Phase.READY,
        "model": "m",
        "engine": "emulated",
        "performance": PERFORMANCE,
        "layout": KvLayout(layers=4, kv_heads=2, head_dim=64),
        "kv_blocks": 1024,
        "context_tokens": 8192,
        "max_running": 16,
        "step_budget_tokens": 512,
        "ready_since_s": 0.0,
    }
    return Replica(replica_id=replica_id, role=role, **(facts | changes))


def load(replica_id: str, sequence: int = 1, at_s: float = 1.0, **changes: object) -> Load:
    facts: dict[str, object] = {"phase": Phase.READY, "running": 0, "waiting": 0, "waiting_tokens": 0, "kv_tokens": 0}
    return Load(replica_id=replica_id, sequence=sequence, at_s=at_s, **(facts | {"kv_blocks_used": 0} | changes))


def ask(request_id: str = "r", prompt_tokens: int = 512, **changes: object) -> Ask:
    facts: dict[str, object] = {"model": "m", "block_hashes": (), "expected_output_tokens": 64, "max_output_tokens": 128}
    return Ask(request_id=request_id, prompt_tokens=prompt_tokens, **(facts | changes))


@pytest.fixture(scope="session")
def small() -> SimpleNamespace:
    return SimpleNamespace(replica=replica, load=load, ask=ask)


@pytest.fixture(scope="session")
def router() -> PredictedLatencyRouter:
    made = PredictedLatencyRouter()
    made.warm()
    return made
