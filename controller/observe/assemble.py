"""One snapshot from what was heard: the config, the membership table, load reports, raw samples of counters, and the memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import numpy as np

from cluster.fleet import Fleet, NodeSpec
from cluster.metrics import (
    ARRIVALS,
    ARRIVED_TOKENS,
    ARRIVED_TOKENS_SQUARED,
    CACHED_TOKENS,
    DEMAND_NAMES,
    IN_FLIGHT,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    QUEUED,
    REQUESTS,
    TPOT,
    TTFT,
)
from cluster.node import Node
from cluster.replica import Load, Replica
from cluster.slo import Slo
from cluster.snapshot import ClusterSnapshot, Group, ReplicaState, Workload
from controller.memory import Memory
from controller.observe.counters import LATE_S, Series, covered_until_s, demand, latency, risen, share_within

BUCKET_S = 1.0  # A burst shows in the bucket after it, and counts of a second are still told from noise by their windows.
BUCKETS = 300
LATENCY_SPAN_S = 60.0  # Of measured quantiles: enough requests for a P99 at 2 requests/s, recent enough to follow a change.
SPAN_S = BUCKETS * BUCKET_S + LATENCY_SPAN_S

Telemetry = Mapping[str, Sequence[Series]]


class Heard(msgspec.Struct, frozen=True, kw_only=True):
    """The last load report of a replica, and when it came, in Unix seconds of the controller."""

    load: Load
    at_s: float


def assemble(
    fleet: Fleet,
    replicas: Iterable[Replica],
    heard: Mapping[str, Heard],
    alive: frozenset[str],
    since_s: Mapping[str, float],
    telemetry: Telemetry,
    memory: Memory,
    now_s: float,
) -> ClusterSnapshot:
    """alive: names of nodes that are up. since_s: when each replica entered its phase. telemetry: series by name, of `SPAN_S`."""
    now_s = round(max(now_s, memory.now_s + 0.001), 3)
    pools = {node.name: node.pool for node in fleet.nodes}
    states = tuple(
        _state(replica, pools.get(replica.node, ""), heard.get(replica.replica_id), since_s.get(replica.replica_id, now_s), now_s)
        for replica in sorted(replicas, key=lambda replica: replica.replica_id)
    )
    members: dict[str, list[tuple[Replica, ReplicaState]]] = {}
    for replica, state in zip(sorted(replicas, key=lambda replica: replica.replica_id), states, strict=True):
        members.setdefault(state.group, []).append((replica, state))
    return ClusterSnapshot(
        now_s=now_s,
        pass_number=memory.pass_number,
        next_replica=memory.next_replica,
        nodes=tuple(_node(node, alive) for node in sorted(fleet.nodes, key=lambda node: node.name)),
        groups=groups_of(fleet, members, memory),
        replicas=states,
        workloads=tuple(_workload(model.name, _slo(fleet), telemetry, now_s) for model in fleet.models),
        holds=tuple(hold for hold in memory.holds if hold.expires_s > now_s),
        failed_starts=memory.failed_starts,
    )


def groups_of(fleet: Fleet, members: Mapping[str, Sequence[tuple[Replica, ReplicaState]]], memory: Memory) -> tuple[Group, ...]:
    """One group for each model, role and pool of the config; what a replica is like is taken from those that are there."""
    made = []
    for spec in fleet.replicas:
        model = spec.model or fleet.models[0].name
        name = f"{model}/{spec.role.value}/{spec.pool}"
        known = memory.of(name, spec.count)
        there = members.get(name, ())
        made.append(
            Group(
                model=model,
                role=spec.role,
                pool=spec.pool,
                min_replicas=spec.count if spec.min_replicas is None else spec.min_replicas,
                max_replicas=spec.count if spec.max_replicas is None else spec.max_replicas,
                wanted=known.wanted,
                performance=there[0][0].performance if there else None,
                slowdown=_slowdown(there, known.slowdown),
                kv_tokens=spec.kv_blocks * spec.block_tokens,
                max_running=spec.max_running,
                step_budget_tokens=spec.step_budget_tokens,
                startup_s=spec.startup_s if known.startup_s is None else known.startup_s,
                changed_up_s=known.changed_up_s,
                changed_down_s=known.changed_down_s,
            )
        )
    return tuple(sorted(made, key=lambda group: group.name))


def _state(replica: Replica, pool: str, heard: Heard | None, since_s: float, now_s: float) -> ReplicaState:
    return ReplicaState(
        replica_id=replica.replica_id,
        group=f"{replica.model}/{replica.role.value}/{pool}",
        role=replica.role,
        phase=replica.phase,
        node=replica.node,
        phase_since_s=round(since_s, 3),
        load=None if heard is None else _rounded(heard.load),
        load_age_s=0.0 if heard is None else round(max(0.0, now_s - heard.at_s), 1),
    )


def _rounded(load: Load) -> Load:
    """As many digits as mean something; a figure that is no number says nothing."""
    digits = {"at_s": 1, "step_s": 5, "power_w": 0, "overrun_share": 2}
    figures = {field: getattr(load, field) for field in digits}
    return msgspec.structs.replace(
        load, **{field: round(value, digits[field]) if math.isfinite(value) else 0.0 for field, value in figures.items()}
    )


def _slowdown(members: Sequence[tuple[Replica, ReplicaState]], before: float) -> float:
    """Measured over predicted time of decode steps, the median of replicas that do nothing else: a tenth of the way there."""
    ratios = []
    for replica, state in members:
        load = state.load
        if load is not None and load.running > 0 and load.waiting == 0 and load.step_s > 0.0:
            ratios.append(load.step_s / replica.performance.decode_step_s(load.running, load.kv_tokens))
    if not ratios:
        return before
    return round(before + 0.1 * (min(max(statistics.median(ratios), 0.25), 4.0) - before), 3)


def _node(spec: NodeSpec, alive: frozenset[str]) -> Node:
    return Node(
        name=spec.name,
        pool=spec.pool,
        accelerator=spec.accelerator,
        market=spec.market,
        zone=spec.zone,
        power_domain=spec.power_domain,
        price_usd_per_hour=spec.price_usd_per_hour,
        slots=spec.slots,
        alive=spec.name in alive,
    )


def _slo(fleet: Fleet) -> Slo:
    """The class that requests are of unless they say otherwise."""
    return fleet.slo.get("default", Slo())


def _workload(model: str, slo: Slo, telemetry: Telemetry, now_s: float) -> Workload:
    mine = {name: [one for one in telemetry.get(name, ()) if one.labels.get("model") == model] for name in DEMAND_NAMES}
    until_s = covered_until_s(mine[ARRIVALS])
    if math.isinf(until_s):  # Nobody asked yet: that is known as long as gateways are heard at all.
        until_s = covered_until_s(one for series in telemetry.values() for one in series)
    if math.isinf(until_s):
        return Workload(model=model, slo=slo, bucket_s=BUCKET_S, buckets=(), age_s=now_s)
    last_s = math.floor(until_s / BUCKET_S) * BUCKET_S
    first_s = min(one.times_s[0] for series in telemetry.values() for one in series if one.times_s)
    count = min(BUCKETS, max(0, math.floor((last_s - first_s) / BUCKET_S)))
    edges_s = np.linspace(last_s - count * BUCKET_S, last_s, count + 1)
    span_s = np.array([last_s - BUCKETS * BUCKET_S, last_s])

    def total(name: str) -> float:
        return float(risen(mine[name], span_s)[0])

    ended, prompts = total(REQUESTS), total(PROMPT_TOKENS)
    cached_share = round(min(1.0, total(CACHED_TOKENS) / prompts), 3) if prompts else 0.0
    output_tokens = round(total(OUTPUT_TOKENS) / ended, 1) if ended else 0.0
    ttft, tpot = _histogram(mine[TTFT]), _histogram(mine[TPOT])
    recent_s = last_s - LATENCY_SPAN_S
    attained = [
        share_within(buckets, bound_s, recent_s, last_s)
        for buckets, bound_s in ((ttft, slo.ttft_s), (tpot, slo.tpot_s))
        if bound_s is not None
    ]
    return Workload(
        model=model,
        slo=slo,
        bucket_s=BUCKET_S,
        buckets=demand(mine[ARRIVALS], mine[ARRIVED_TOKENS], mine[ARRIVED_TOKENS_SQUARED], edges_s, cached_share, output_tokens),
        age_s=round(now_s - last_s, 1),
        queued=_latest(mine[QUEUED], until_s),
        in_flight=_latest(mine[IN_FLIGHT], until_s),
        ttft=latency(ttft, recent_s, last_s),
        tpot=latency(tpot, recent_s, last_s),
        attainment=min((share for share in attained if share is not None), default=None),
    )


def _histogram(series: Sequence[Series]) -> dict[float, list[Series]]:
    buckets: dict[float, list[Series]] = {}
    for one in series:
        buckets.setdefault(float(one.labels["le"]), []).append(one)
    return buckets


def _latest(series: Sequence[Series], until_s: float) -> int:
    """Sum of gauges, of processes that are still heard."""
    return round(sum(one.values[-1] for one in series if one.times_s and one.times_s[-1] > until_s - LATE_S))
