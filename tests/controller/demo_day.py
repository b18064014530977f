"""The demo's five minutes, decided by its own policies on its own traffic, one pass a second: what `make demo` is about."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import demo
from cluster.fleet import Fleet
from cluster.snapshot import ClusterSnapshot, Demand
from controller.config import parse_fleet
from controller.journal import Entry, Journal
from controller.memory import Memory, after
from controller.observe.assemble import BUCKETS, Seen, assemble
from controller.pipelines import as_text, build
from demo.__main__ import KILL_AT_S, VICTIM
from tests.controller import scripted
from tests.policies.clusters import NOW_S, workload
from workloads.traces import open_trace

DEMO = Path(demo.__file__).parent
STARTUP_S = 9.0
BEFORE_S, AFTER_S = 60, 30  # What lies around the traffic, without any.


def play(path: Path) -> Journal:
    """Journals every pass. Requests are answered at once, and nothing is learnt of latency."""
    fleet = parse_fleet((DEMO / "cluster.yaml").read_bytes(), DEMO)
    pipeline, text, journal, memory = build(fleet.control.pipeline), as_text(fleet.control.pipeline), Journal(path), Memory()
    buckets = [*[Demand()] * BEFORE_S, *demand(), *[Demand()] * AFTER_S]
    alive = frozenset(node.name for node in fleet.nodes)
    machines = scripted.Fleet(assemble(fleet, Seen(alive=alive), {}, memory, NOW_S).nodes, STARTUP_S)
    for number in range(len(buckets)):
        now_s = NOW_S + number
        machines.step(now_s)
        if number == BEFORE_S + KILL_AT_S + 5:  # Seconds until it is noticed.
            machines.lose(VICTIM, now_s)
        snapshot = seen(fleet, machines, memory, tuple(buckets[max(0, number - BUCKETS) : number]), now_s)
        decision = pipeline.decide(snapshot)
        journal.write(Entry(epoch=1, pipeline=text, mode="act", snapshot=snapshot, decision=decision))
        machines.apply(decision, {group.name: group.role for group in snapshot.groups}, now_s)
        memory = after(memory, snapshot, decision, applied=True)
    return journal


def demand() -> list[Demand]:
    """Of each second of the demo's traffic."""
    sums: dict[int, Counter[str]] = {}
    for row in open_trace(DEMO / "traffic.jsonl"):
        second = sums.setdefault(int(row.arrival_s), Counter())
        second.update(
            requests=1,
            prompt_tokens=row.prompt_tokens,
            prompt_tokens_squared=row.prompt_tokens**2,
            output_tokens=row.output_tokens,
        )
    return [Demand(**{name: float(count) for name, count in sums.get(second, {}).items()}) for second in range(max(sums) + 1)]


def seen(fleet: Fleet, machines: scripted.Fleet, memory: Memory, buckets: tuple[Demand, ...], now_s: float) -> ClusterSnapshot:
    known = assemble(fleet, Seen(), {}, memory, now_s)
    return ClusterSnapshot(
        now_s=now_s,
        pass_number=memory.pass_number,
        next_replica=memory.next_replica,
        nodes=tuple(machines.nodes.values()),
        groups=known.groups,
        replicas=tuple(machines.replicas[name] for name in sorted(machines.replicas)),
        workloads=(workload((), model="tiny-dense", slo=fleet.slo["default"], buckets=buckets, bucket_s=1.0, attainment=1.0),),
    )
