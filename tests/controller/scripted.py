"""A small fleet under a script, played through the policies into a journal: a burst, prompts growing long, a node lost, a lull."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from cluster.actions import ChangeRole, Decision, DrainReplica, StartReplica
from cluster.fleet import PipelineSpec
from cluster.node import Node
from cluster.replica import Phase, Role
from cluster.snapshot import ClusterSnapshot, Demand, ReplicaState
from controller.journal import Entry, Journal, Outcome
from controller.memory import Memory, after
from controller.pipelines import as_text, build
from policies.pipeline import Pipeline
from tests.policies.clusters import BUCKET_S, NOW_S, demand, group, workload

QUIET, BURST, PROMPTS, LULL = (10.0, 1000.0, 200.0), (70.0, 1000.0, 200.0), (24.0, 5000.0, 40.0), (6.0, 1000.0, 200.0)
SCRIPT = ((QUIET, 12), (BURST, 30), (PROMPTS, 42), (LULL, 72))
"""(requests/s, prompt tokens, output tokens), and for how many passes."""
LOST_AT, LOST_NODE = 60, "n1"
STARTUP_S = 20.0
LEAVING_S = 10.0
NODES = tuple(Node(name=f"n{index}", pool="p", slots=6, price_usd_per_hour=6.0) for index in range(8))
REMEMBERED = 60  # Buckets.
_set = msgspec.structs.replace


class Fleet:
    """What the actions of the passes make of it."""

    def __init__(self, nodes: Iterable[Node] = NODES, startup_s: float = STARTUP_S) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.replicas: dict[str, ReplicaState] = {}
        self._startup_s = startup_s

    def step(self, now_s: float) -> None:
        """Starts become READY, drains end."""
        for one in list(self.replicas.values()):
            if one.phase is Phase.STARTING and now_s - one.phase_since_s >= self._startup_s:
                self.replicas[one.replica_id] = _set(one, phase=Phase.READY, phase_since_s=now_s)
            elif one.phase is Phase.DRAINING and now_s - one.phase_since_s >= LEAVING_S:
                del self.replicas[one.replica_id]

    def lose(self, node: str, now_s: float) -> None:
        self.nodes[node] = _set(self.nodes[node], alive=False)
        for one in list(self.replicas.values()):
            if one.node == node:
                self.replicas[one.replica_id] = _set(one, phase=Phase.LOST, phase_since_s=now_s)

    def apply(self, decision: Decision, roles: Mapping[str, Role], now_s: float) -> None:
        for action in decision.actions:
            match action:
                case StartReplica():
                    self.replicas[action.replica_id] = ReplicaState(
                        replica_id=action.replica_id,
                        group=action.group,
                        role=roles[action.group],
                        phase=Phase.STARTING,
                        node=action.node,
                        phase_since_s=now_s,
                    )
                case DrainReplica():
                    one = self.replicas[action.replica_id]
                    self.replicas[action.replica_id] = _set(one, phase=Phase.DRAINING, phase_since_s=now_s)
                case ChangeRole():
                    one = self.replicas[action.replica_id]
                    self.replicas[action.replica_id] = _set(one, group=action.target, role=action.role)


def play(path: Path, challengers: Mapping[str, Pipeline] | None = None, spec: PipelineSpec | None = None) -> Journal:
    """The whole script; every action that is decided has become `done` by the next pass."""
    spec = spec or PipelineSpec()
    pipeline, text, journal, fleet, memory = build(spec), as_text(spec), Journal(path), Fleet(), Memory()
    buckets = deque([demand(*QUIET)] * REMEMBERED, maxlen=REMEMBERED)
    number = 0
    for load, passes in SCRIPT:
        for _ in range(passes):
            now_s = NOW_S + number * BUCKET_S
            fleet.step(now_s)
            if number == LOST_AT:
                fleet.lose(LOST_NODE, now_s)
            buckets.append(demand(*load))
            snapshot = seen(fleet, memory, tuple(buckets), now_s)
            decision = pipeline.decide(snapshot)
            shadows = {name: other.decide(snapshot) for name, other in (challengers or {}).items()}
            journal.write(Entry(epoch=1, pipeline=text, mode="act", snapshot=snapshot, decision=decision, shadows=shadows))
            for index in range(len(decision.actions)):
                journal.add([Outcome(number=number, action=index, at_s=now_s + 4.0, outcome="done")])
            fleet.apply(decision, {one.name: one.role for one in snapshot.groups}, now_s)
            memory = after(memory, snapshot, decision, applied=True)
            number += 1
    return journal


def seen(fleet: Fleet, memory: Memory, buckets: tuple[Demand, ...], now_s: float) -> ClusterSnapshot:
    groups = []
    for role, least in ((Role.DECODE, 2), (Role.PREFILL, 1)):
        known = memory.of(f"m/{role.value}/p", least)
        groups.append(
            group(
                role,
                known.wanted,
                min_replicas=1,
                max_replicas=20,
                startup_s=STARTUP_S,
                changed_up_s=known.changed_up_s,
                changed_down_s=known.changed_down_s,
            )
        )
    return ClusterSnapshot(
        now_s=now_s,
        pass_number=memory.pass_number,
        next_replica=memory.next_replica,
        nodes=tuple(fleet.nodes.values()),
        groups=tuple(groups),
        replicas=tuple(fleet.replicas[name] for name in sorted(fleet.replicas)),
        workloads=(workload((), buckets=buckets),),
    )
