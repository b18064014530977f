"""The controller in simulated time: once a second it observes, decides, remembers and acts, by the live pipeline and memory."""

from __future__ import annotations

import msgspec

from cluster.actions import Action, Decision, DrainReplica, ScaleRole, StartReplica
from cluster.snapshot import ClusterSnapshot
from controller.memory import Memory, after
from policies.pipeline import Pipeline
from simulator.cluster import SimulatedCluster

PASS_S = 1.0


class Act(msgspec.Struct, frozen=True, kw_only=True):
    """One action that was decided, and why."""

    at_s: float
    action: str
    reason: str
    numbers: dict[str, float] = {}


class Control:
    """Keeps the memory between passes, and what was decided."""

    def __init__(self, pipeline: Pipeline, cluster: SimulatedCluster) -> None:
        self.memory = Memory(next_replica=cluster.next_replica)
        self.acts: list[Act] = []
        self.passes = 0
        self._pipeline, self._cluster = pipeline, cluster

    def once(self) -> tuple[ClusterSnapshot, Decision]:
        """One pass. A policy that raises makes a live one do nothing; here it ends the simulation, which is for proving it."""
        snapshot = self._cluster.observe(self.memory)
        decision = self._pipeline.decide(snapshot)
        if decision.failed:
            raise AssertionError(f"pass {snapshot.pass_number} at {snapshot.now_s} s: {decision.failed}")
        self.memory = self._cluster.settle(snapshot, after(self.memory, snapshot, decision, applied=True)).memory
        self._cluster.apply(snapshot.pass_number, decision.actions)
        self.passes += 1
        if decision.actions:
            self._note(snapshot, decision)
        return snapshot, decision

    def _note(self, snapshot: ClusterSnapshot, decision: Decision) -> None:
        """Starts and drains follow from their group's new target, and are told as that."""
        wished = {wish.group: wish for wish in decision.wishes if isinstance(wish, ScaleRole)}
        groups = {state.replica_id: state.group for state in snapshot.replicas}
        told: dict[str, Action] = {}
        for action in decision.actions:
            group = action.group if isinstance(action, StartReplica) else groups.get(getattr(action, "replica_id", ""), "")
            scaled = wished.get(group) if isinstance(action, StartReplica | DrainReplica) else None
            told.setdefault((scaled or action).words, scaled or action)
        for words, action in told.items():
            numbers = dict(action.reason.numbers)
            self.acts.append(Act(at_s=round(snapshot.now_s, 3), action=words, reason=action.reason.text, numbers=numbers))
