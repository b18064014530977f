"""One snapshot from what was heard: the config, the membership table, load reports, raw samples of counters, and the memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import xxhash

from cluster.fleet import Fleet, NodeSpec, ReplicaGroup
from cluster.metrics import ARRIVALS, DEMAND_NAMES, IN_FLIGHT, QUEUED, TPOT, TTFT
from cluster.node import Node
from cluster.performance import PerformanceModel
from cluster.placement import group_name, group_of, limits_at, slots_of
from cluster.replica import Load, Phase, Replica, Role
from cluster.slo import Slo
from cluster.snapshot import ClusterSnapshot, Group, ReplicaState, Workload
from controller.memory import GroupMemory, Memory
from controller.observe.counters import LATE_S, Series, Telemetry, covered_until_s, demand, latency, share_within
from policies.flow import LATENCY_SPAN_S
from workers.build_engine import performance_of

BUCKET_S = 1.0  # A burst shows in the bucket after it, and counts of a second are still told from noise by their windows.
BUCKETS = 300
SLOWDOWN_S = 10.0  # A few steps' figures are noise; of a machine that has become slow the policies know within half a minute.
MAX_FIGURE = 1e12  # Of a load report: above any watts or Unix time, and exact to the digits that are kept.
SPAN_S = BUCKETS * BUCKET_S + LATENCY_SPAN_S


class Heard(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The last load report of a replica, and when it came, in Unix seconds of the controller."""

    load: Load
    at_s: float


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that was started and has not registered yet."""

    group: str
    node: str
    at_s: float


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of machines and replicas, by replica id where it is a mapping."""

    replicas: tuple[Replica, ...] = ()
    """The membership table."""
    started: Mapping[str, Started] = {}
    lost: tuple[ReplicaState, ...] = ()
    """Whose workers fell silent of late."""
    heard: Mapping[str, Heard] = {}
    since_s: Mapping[str, float] = {}
    """When each entered its phase."""
    alive: frozenset[str] = frozenset()
    """Names of nodes that are up."""
    draining: frozenset[str] = frozenset()
    """Replicas that were told to drain, whether they say so yet or not."""
    changing: Mapping[str, Role] = {}
    """Those that were told to change their role, and to which."""


def assemble(fleet: Fleet, seen: Seen, telemetry: Telemetry, memory: Memory, now_s: float, ahead_s: float = 0.0) -> ClusterSnapshot:
    """telemetry: series by name, of `SPAN_S`. ahead_s: of the clock on the wall, which schedules go by."""
    now_s = round(max(now_s, memory.now_s + 0.001), 3)
    states = _states(fleet, seen, now_s)
    registered = {state.replica_id for state in states}
    members: dict[str, list[tuple[Replica, ReplicaState]]] = {}
    for replica, state in zip(seen.replicas, states, strict=True):
        members.setdefault(state.group, []).append((replica, state))
    states += [_ordered(_starting(name, start), seen) for name, start in seen.started.items() if name not in registered]
    states += [state for state in seen.lost if state.replica_id not in registered]
    return ClusterSnapshot(
        now_s=now_s,
        pass_number=memory.pass_number,
        next_replica=memory.next_replica,
        nodes=tuple(_node(fleet, node, seen.alive) for node in sorted(fleet.nodes, key=lambda node: node.name)),
        groups=_groups(fleet, members, memory, now_s, ahead_s),
        replicas=tuple(sorted(states, key=lambda state: state.replica_id)),
        workloads=tuple(_workload(model.name, _slo(fleet), telemetry, now_s) for model in fleet.models),
        holds=tuple(hold for hold in memory.holds if hold.expires_s > now_s),
        failed_starts=memory.failed_starts,
    )


def _groups(
    fleet: Fleet, members: Mapping[str, Sequence[tuple[Replica, ReplicaState]]], memory: Memory, now_s: float, ahead_s: float
) -> tuple[Group, ...]:
    """One group for each model, role and pool of the config; what a replica is like is taken from those that are there."""
    made = []
    for spec in fleet.replicas:
        name = group_of(fleet, spec)
        known = memory.of(name, spec.count)
        there = members.get(name, ())
        low, high = limits_at(spec, now_s + ahead_s)
        made.append(
            Group(
                model=spec.model or fleet.models[0].name,
                role=spec.role,
                pool=spec.pool,
                build=_build(spec),
                min_replicas=low,
                max_replicas=high,
                wanted=known.wanted,
                performance=_performance(spec, there, known),
                slowdown=_slowdown(there, known.slowdown, now_s - memory.now_s),
                kv_tokens=spec.kv_blocks * spec.block_tokens,
                max_running=spec.max_running,
                step_budget_tokens=spec.step_budget_tokens,
                startup_s=spec.startup_s if known.startup_s is None else known.startup_s,
                changed_up_s=known.changed_up_s,
                changed_down_s=known.changed_down_s,
            )
        )
    return tuple(sorted(made, key=lambda group: group.name))


def _build(spec: ReplicaGroup) -> str:
    """Equal where a replica of the one can take the role of the other: all but role and numbers of them."""
    alike = msgspec.structs.replace(
        spec, role=Role.MIXED, count=1, min_replicas=None, max_replicas=None, schedules=(), startup_s=0.0, start_timeout_s=0.0
    )
    return xxhash.xxh3_64_hexdigest(msgspec.json.encode(alike))


def _performance(spec: ReplicaGroup, there: Sequence[tuple[Replica, ReplicaState]], known: GroupMemory) -> PerformanceModel | None:
    """A replica's own word, the last one's, or what a pace prescribes. One that has not measured itself yet says 0."""
    for replica, _ in there:
        if replica.performance.step_s > 0.0:
            return replica.performance
    if known.performance is not None or spec.pace is None:
        return known.performance
    return performance_of(spec.pace)


def _states(fleet: Fleet, seen: Seen, now_s: float) -> list[ReplicaState]:
    """Of the membership table, in its order."""
    pools = {node.name: node.pool for node in fleet.nodes}
    names = [replica.replica_id for replica in seen.replicas]
    heard = [seen.heard.get(name) for name in names]
    loads = iter(_rounded([one.load for one in heard if one is not None]))
    ages_s = _round([0.0 if one is None else max(0.0, now_s - one.at_s) for one in heard], 1)
    since_s = _round([seen.since_s.get(name, now_s) for name in names], 3)
    ready_s = _round([replica.ready_since_s or 0.0 for replica in seen.replicas], 3)
    states = [
        ReplicaState(
            replica_id=replica.replica_id,
            group=group_name(replica.model, replica.role, pools.get(replica.node, "")),
            role=replica.role,
            phase=replica.phase,
            node=replica.node,
            phase_since_s=phase_since_s,
            ready_since_s=ready_since_s if replica.ready_since_s is not None else None,
            load=None if one is None else next(loads),
            load_age_s=age_s,
        )
        for replica, one, age_s, phase_since_s, ready_since_s in zip(seen.replicas, heard, ages_s, since_s, ready_s, strict=True)
    ]
    if not seen.draining and not seen.changing:
        return states
    return [_ordered(state, seen) for state in states]


def _ordered(state: ReplicaState, seen: Seen) -> ReplicaState:
    """As it will be, once it has heard: so that nothing is ordered twice."""
    role = seen.changing.get(state.replica_id)
    if role is not None and role is not state.role:
        model, _, pool = state.group.rsplit("/", 2)
        state = msgspec.structs.replace(state, role=role, group=group_name(model, role, pool), phase=Phase.WARMING)
    if state.replica_id in seen.draining and state.phase is not Phase.STOPPED:
        state = msgspec.structs.replace(state, phase=Phase.DRAINING)
    return state


def _starting(replica_id: str, start: Started) -> ReplicaState:
    role = Role(start.group.rsplit("/", 2)[1])
    return ReplicaState(
        replica_id=replica_id,
        group=start.group,
        role=role,
        phase=Phase.STARTING,
        node=start.node,
        phase_since_s=round(start.at_s, 3),
    )


def _rounded(loads: Sequence[Load]) -> list[Load]:
    """To the digits that a journal keeps cheaply, and that nobody decides by; what is no number, or none that is measured, is 0."""
    at_s, step_s, slowdown, power_w, overrun_share = (
        _round([getattr(load, field) for load in loads], digits)
        for field, digits in (("at_s", 1), ("step_s", 5), ("slowdown", 2), ("power_w", 0), ("overrun_share", 2))
    )
    return [
        msgspec.structs.replace(load, at_s=at, step_s=step, slowdown=slow, power_w=power, overrun_share=share)
        for load, at, step, slow, power, share in zip(loads, at_s, step_s, slowdown, power_w, overrun_share, strict=True)
    ]


def _round(figures: Sequence[float], digits: int) -> list[float]:
    """All at once: of ten thousand replicas one by one this alone would take a tenth of a pass."""
    scale, given = 10.0**digits, np.array(figures, dtype=np.float64)
    rounded: list[float] = (np.rint(np.where(np.abs(given) <= MAX_FIGURE, given, 0.0) * scale) / scale).tolist()
    return rounded


def _slowdown(members: Sequence[tuple[Replica, ReplicaState]], before: float, since_s: float) -> float:
    """The median of replicas that compute, approached in some `SLOWDOWN_S`."""
    loads = (state.load for replica, state in members if replica.performance.step_s > 0.0)
    told = [load.slowdown for load in loads if load is not None and load.running > 0 and load.slowdown > 0.0]
    if not told:
        return before
    weight = -math.expm1(-min(since_s, 1.0 if math.isinf(since_s) else SLOWDOWN_S) / SLOWDOWN_S)
    return round(before + weight * (min(max(statistics.median(told), 0.25), 4.0) - before), 3)


def _node(fleet: Fleet, spec: NodeSpec, alive: frozenset[str]) -> Node:
    return Node(
        name=spec.name,
        pool=spec.pool,
        accelerator=spec.accelerator,
        market=spec.market,
        zone=spec.zone,
        power_domain=spec.power_domain,
        price_usd_per_hour=spec.price_usd_per_hour,
        slots=slots_of(fleet, spec),
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
        buckets=demand(mine, edges_s),
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
