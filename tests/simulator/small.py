"""A small fleet and its traffic, to simulate in a second."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from cluster.fleet import Fleet, GatewaySpec, ModelSpec, NodeSpec, Pace, ReplicaGroup
from cluster.node import Market
from cluster.record import TraceRow
from cluster.replica import Role
from cluster.slo import Slo

PACE = Pace(shape="llama-3.1-8b", accelerator="h100")


def group(role: Role, **changes: object) -> ReplicaGroup:
    facts = {
        "role": role,
        "engine": "emulated",
        "pace": PACE,
        "kv_blocks": 2000,
        "max_running": 32,
        "step_budget_tokens": 1024,
        "startup_s": 10.0,
        "pool": "h100",
    }
    return ReplicaGroup(**{**facts, **changes})


APART = (group(Role.PREFILL, count=2, max_replicas=4, min_replicas=1), group(Role.DECODE, count=2, max_replicas=4, min_replicas=1))
TOGETHER = (group(Role.MIXED, count=2, max_replicas=6, min_replicas=1),)


def fleet(groups: tuple[ReplicaGroup, ...] = TOGETHER, **changes: object) -> Fleet:
    facts = {
        "models": (ModelSpec(name="m", path="m"),),
        "nodes": (
            *(NodeSpec(name=f"node-{i}", pool="h100", accelerator="h100", slots=2, price_usd_per_hour=6.0) for i in range(3)),
            NodeSpec(name="spot-0", pool="h100", accelerator="h100", slots=2, price_usd_per_hour=2.0, market=Market.SPOT, zone="a"),
        ),
        "replicas": groups,
        "gateway": GatewaySpec(allow_anonymous=True, replicas=2),
        "slo": {"default": Slo(ttft_s=1.0, tpot_s=0.05), "batch": Slo()},
    }
    return Fleet(**{**facts, **changes})


def traffic(count: int, rate_rps: float, seed: int = 0, *, shared: bool = True) -> Iterator[TraceRow]:
    """Prompts of which half begin alike, of two tenants, classes and priorities."""
    chance, at_s = Random(seed), 0.0
    for number in range(count):
        at_s += chance.expovariate(rate_rps)
        prompt = chance.randint(20, 1500)
        hashes: list[int] = []
        if shared:
            opening = Random(chance.randrange(4)) if chance.random() < 0.5 else Random(number + 10)
            hashes = [opening.getrandbits(64) for _ in range(20)]
            hashes = [*hashes, *(chance.getrandbits(64) for _ in range(len(hashes), prompt // 16))][: prompt // 16]
        yield TraceRow(
            arrival_s=at_s,
            prompt_tokens=prompt,
            output_tokens=chance.randint(0, 150),
            block_hashes=tuple(hashes),
            tenant=chance.choice(("a", "b")),
            slo_class=chance.choice(("default", "default", "batch")),
            priority=chance.choice((0, 0, 5)),
        )
