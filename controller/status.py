"""What people look at: a fleet as its controller sees it now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from cluster.actions import Decision, ScaleRole
from cluster.fleet import Fleet
from cluster.replica import Membership, Phase, Replica
from cluster.slo import Slo
from cluster.snapshot import ClusterSnapshot, Hold, Latency, ReplicaState, Workload
from policies.expansion import Expansion

FLOW_S = 15.0  # Over which the rate that is shown is meant.
HELD = ("cordon", "drain")  # What may be said of a node, the stronger last.


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One machine."""

    name: str
    pool: str
    accelerator: str
    market: str
    zone: str
    power_domain: str
    price_usd_per_hour: float
    alive: bool
    held: str = ""
    """`cordon` or `drain`, where an operator has said so."""
    slots: int
    replicas: int
    power_w: float


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One replica. Of one that has not registered only id, role, phase and node are known."""

    replica_id: str
    group: str
    role: str
    phase: str
    node: str
    model: str = ""
    worker_id: str = ""
    pid: int | None = None
    endpoint: str = ""
    metrics_url: str = ""
    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks: int = 0
    step_s: float = 0.0
    power_w: float = 0.0
    load_age_s: float = 0.0


class GroupStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One group: how many are wanted, and how many serve."""

    name: str
    wanted: int
    ready: int
    min_replicas: int
    max_replicas: int


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a model, and how it fares."""

    model: str
    rate_rps: float
    queued: int
    in_flight: int
    slo: Slo
    ttft: Latency | None
    tpot: Latency | None
    attainment: float | None
    """Share of the last minute's requests inside their SLO; None where none ended."""
    age_s: float
    """Of these figures."""
    stale: bool = False
    """Too old to be acted upon, as the guard of the pipeline has it."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was decided."""

    number: int
    """Of the pass."""
    at_s: float
    text: str
    reason: str
    advised: bool = False
    """Only that: it is not carried out."""
    index: int = 0
    """Among the pass's actions."""
    outcome: str = ""
    """What became of it; empty while it is under way."""


class HeldBack(msgspec.Struct, frozen=True, kw_only=True):
    """A wish of the last pass that is not carried out, or not wholly."""

    text: str
    by: str
    """The guard, or the policy that went before."""
    why: str


class FleetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What `mobula status --json` prints."""

    fleet: str
    url: str = ""
    version: int
    """Of the membership table."""
    epoch: int
    mode: str
    pass_number: int
    now_s: float
    gateways: tuple[str, ...] = ()
    """Each gateway replica at its own address, which nobody shares: where its metrics are to be scraped."""
    http_url: str = ""
    """Of the controller: its metrics, and service discovery."""
    prometheus_url: str = ""
    controller_pid: int = 0
    price_usd_per_hour: float = 0.0
    """Of the nodes that are up."""
    used_usd_per_hour: float = 0.0
    """Of those that host a replica."""
    power_w: float = 0.0
    failures: int = 0
    """Passes that did nothing because something in them failed."""
    unwritten: int = 0
    """Passes that are not wholly in the journal."""
    nodes: tuple[NodeStatus, ...] = ()
    groups: tuple[GroupStatus, ...] = ()
    models: tuple[ModelStatus, ...] = ()
    replicas: tuple[ReplicaStatus, ...] = ()
    holds: tuple[Hold, ...] = ()
    held_back: tuple[HeldBack, ...] = ()
    """By the last pass."""
    nonsense: int = 0
    """Load reports that could not be, and were left out."""
    changes: tuple[Change, ...] = ()
    """The latest, newest first."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that did not start."""

    replica_id: str
    error: str
    permanent: bool


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far the first start is."""

    wanted: int
    ready: tuple[str, ...]
    failures: tuple[Failure, ...]


def changes_of(number: int, at_s: float, mode: str, decision: Decision) -> tuple[Change, ...]:
    """What a pass changes."""
    return tuple(
        Change(number=number, at_s=at_s, text=action.words, reason=action.reason.text, advised=mode != "act", index=index)
        for index, action in enumerate(decision.actions)
    )


def fleet_status(
    fleet: Fleet, snapshot: ClusterSnapshot, decision: Decision, membership: Membership, stale_s: float, **more: object
) -> FleetStatus:
    """stale_s: age of telemetry that is not acted upon any more. more: those fields that are not the snapshot's to know."""
    rows = {row.replica_id: row for row in membership.replicas}
    there: dict[str, list[ReplicaState]] = {}
    for replica in snapshot.replicas:
        if replica.phase.value not in ("lost", "stopped"):
            there.setdefault(replica.node, []).append(replica)
    nodes = tuple(_node(snapshot, name, there.get(name, ())) for name in sorted(snapshot.node_by_name))
    return FleetStatus(
        fleet=fleet.name,
        version=membership.version,
        pass_number=snapshot.pass_number,
        now_s=snapshot.now_s,
        price_usd_per_hour=sum(node.price_usd_per_hour for node in nodes if node.alive),
        used_usd_per_hour=sum(node.price_usd_per_hour for node in nodes if node.alive and node.replicas),
        power_w=sum(node.power_w for node in nodes),
        nodes=nodes,
        groups=tuple(_group(snapshot, decision, name) for name in snapshot.group_by_name),
        models=tuple(_model(workload, stale_s) for workload in snapshot.workloads),
        replicas=tuple(_replica(state, rows.get(state.replica_id)) for state in snapshot.replicas),
        holds=snapshot.holds,
        held_back=_held_back(snapshot, decision),
        **more,  # type: ignore[arg-type]
    )


def _held_back(snapshot: ClusterSnapshot, decision: Decision) -> tuple[HeldBack, ...]:
    """But for wishes to stay at what is."""
    wanted = {name: group.wanted for name, group in snapshot.group_by_name.items()}
    return tuple(
        HeldBack(text=one.action.words, by=one.by, why=one.why)
        for one in decision.dropped
        if not isinstance(one.action, ScaleRole) or one.by == Expansion.__name__ or one.action.replicas != wanted[one.action.group]
    )


def _node(snapshot: ClusterSnapshot, name: str, there: Sequence[ReplicaState]) -> NodeStatus:
    node = snapshot.node_by_name[name]
    held = max((hold.kind for hold in snapshot.holds if hold.target == name and hold.kind in HELD), key=HELD.index, default="")
    return NodeStatus(
        name=name,
        pool=node.pool,
        accelerator=node.accelerator,
        market=node.market.value,
        zone=node.zone,
        power_domain=node.power_domain,
        price_usd_per_hour=node.price_usd_per_hour,
        alive=node.alive,
        held=held,
        slots=node.slots,
        replicas=len(there),
        power_w=_power_w(there),
    )


def _power_w(replicas: Iterable[ReplicaState]) -> float:
    return sum(replica.load.power_w for replica in replicas if replica.load is not None)


def _group(snapshot: ClusterSnapshot, decision: Decision, name: str) -> GroupStatus:
    group = snapshot.group_by_name[name]
    ready = sum(replica.phase.value == "ready" for replica in snapshot.replicas_by_group[name])
    return GroupStatus(
        name=name,
        wanted=decision.targets.get(name, group.wanted),
        ready=ready,
        min_replicas=group.min_replicas,
        max_replicas=group.max_replicas,
    )


def _model(workload: Workload, stale_s: float) -> ModelStatus:
    last = workload.buckets[-round(FLOW_S / workload.bucket_s) :]
    span_s = len(last) * workload.bucket_s
    return ModelStatus(
        model=workload.model,
        rate_rps=sum(bucket.requests for bucket in last) / span_s if span_s else 0.0,
        queued=workload.queued,
        in_flight=workload.in_flight,
        slo=workload.slo,
        ttft=workload.ttft,
        tpot=workload.tpot,
        attainment=workload.attainment,
        age_s=workload.age_s,
        stale=workload.age_s > stale_s,
    )


def _phase(state: ReplicaState) -> str:
    """`failed` for one that was lost before it ever served."""
    return "failed" if state.phase is Phase.LOST and state.ready_since_s is None else state.phase.value


def _replica(state: ReplicaState, row: Replica | None) -> ReplicaStatus:
    known = ReplicaStatus(
        replica_id=state.replica_id,
        group=state.group,
        role=state.role.value,
        phase=_phase(state),
        node=state.node,
        load_age_s=state.load_age_s,
    )
    if row is not None:
        known = msgspec.structs.replace(
            known,
            model=row.model,
            worker_id=row.worker_id,
            pid=row.pid or None,
            endpoint=row.endpoint,
            metrics_url=f"http://{row.metrics_endpoint}/metrics" if row.metrics_endpoint else "",
            kv_blocks=row.kv_blocks,
        )
    if state.load is not None:
        fields = ("running", "waiting", "kv_blocks_used", "step_s", "power_w")
        known = msgspec.structs.replace(known, **{field: getattr(state.load, field) for field in fields})
    return known
