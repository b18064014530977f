"""Limits on what policies propose, in the order in which they are to be applied: hard limits last."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec

from cluster.actions import Action, ChangeRole, DrainReplica, Dropped, ScaleRole
from cluster.ranges import at_least, positive, share
from cluster.replica import Phase
from cluster.snapshot import ClusterSnapshot, Group, ReplicaState
from policies.policy import Verdict


class Paused(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An operator's pause stops everything; what is lost meanwhile is replaced, since targets stay."""

    def limit(self, snapshot: ClusterSnapshot, actions: Sequence[Action]) -> Verdict:
        author = next((hold.author for hold in snapshot.holds if hold.kind == "pause"), None)
        if author is None:
            return Verdict(actions=tuple(actions))
        why = f"paused by {author}"
        return _each(actions, "Paused", lambda action: (action, "") if action.ordered else _held(snapshot, action, why))


class StaleTelemetry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is not known any more is not acted upon: the target in force stays, within the group's limits."""

    stale_s: float = 15.0
    """Age of a model's workload at which it is stale. A scrape or two may be missed; in more than this a burst may come and go."""

    def __post_init__(self) -> None:
        positive(stale_s=self.stale_s)

    def limit(self, snapshot: ClusterSnapshot, actions: Sequence[Action]) -> Verdict:
        return _each(actions, "StaleTelemetry", lambda action: self._of(snapshot, action))

    def _of(self, snapshot: ClusterSnapshot, action: Action) -> tuple[Action | None, str]:
        if not isinstance(action, ScaleRole | ChangeRole) or action.ordered:
            return action, ""
        group = snapshot.group_by_name[action.group if isinstance(action, ScaleRole) else action.source]
        workload = snapshot.workload_by_model.get(group.model)
        if workload is None or workload.age_s <= self.stale_s:
            return action, ""
        why = f"telemetry of {group.model} is {workload.age_s:.0f} s old, above {self.stale_s:.0f} s"
        if not isinstance(action, ScaleRole):
            return None, why
        held = min(max(group.wanted, group.min_replicas), group.max_replicas)
        return _with(action, held), why if held != action.replicas else ""


class RateOfChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """No leaps on one reading: a step has a size, and steps down have a distance."""

    up_share: float = 1.0
    """Of the target, at one step up. Doubling each second reaches any size before the first newcomer is ready."""
    up_least: int = 4
    """Replicas that a step up may always add."""
    down_share: float = 0.25
    """Of the target, at one step down: the rest of the fleet must take over the streams that are resumed."""
    down_every_s: float = 15.0
    """Between two steps down of one group."""

    def __post_init__(self) -> None:
        at_least(0.0, up_share=self.up_share, down_every_s=self.down_every_s)
        at_least(1, up_least=self.up_least)
        share(down_share=self.down_share)

    def limit(self, snapshot: ClusterSnapshot, actions: Sequence[Action]) -> Verdict:
        return _each(
            actions, "RateOfChange", lambda action: self._of(snapshot, action), lambda whole: self._of_all(snapshot, whole)
        )

    def _of_all(self, snapshot: ClusterSnapshot, bundle: Sequence[ScaleRole]) -> str:
        """A rearrangement is a step of its groups' sum."""
        groups = [snapshot.group_by_name[action.group] for action in bundle]
        before, after = sum(group.wanted for group in groups), sum(action.replicas for action in bundle)
        most = before + max(self.up_least, math.floor(before * self.up_share))
        least = before - max(1, math.floor(before * self.down_share))
        if not least <= after <= most:
            return f"{after} in all is outside [{least}, {most}], one step from {before}"
        ago_s = min(
            (snapshot.now_s - group.changed_down_s for group in groups if group.changed_down_s is not None), default=math.inf
        )
        return f"the last step down was {ago_s:.0f} s ago, below {self.down_every_s:.0f} s" if ago_s < self.down_every_s else ""

    def _of(self, snapshot: ClusterSnapshot, action: Action) -> tuple[Action | None, str]:
        if not isinstance(action, ScaleRole):
            return action, ""
        group = snapshot.group_by_name[action.group]
        most = group.wanted + max(self.up_least, math.floor(group.wanted * self.up_share))
        if action.replicas > most:
            return _with(action, most), f"{action.replicas} is above {most}, one step up from {group.wanted}"
        if action.replicas >= group.wanted:
            return action, ""
        if group.changed_down_s is not None and snapshot.now_s - group.changed_down_s < self.down_every_s:
            ago_s = snapshot.now_s - group.changed_down_s
            return _with(action, group.wanted), f"the last step down was {ago_s:.0f} s ago, below {self.down_every_s:.0f} s"
        least = group.wanted - max(1, math.floor(group.wanted * self.down_share))
        if action.replicas < least:
            return _with(action, least), f"{action.replicas} is below {least}, one step down from {group.wanted}"
        return action, ""


class DisruptionBudget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Only so many replicas of a group may be leaving at one time."""

    leaving_share: float = 0.34
    """Of the group's target; at least one may always leave, but for a node that is emptied: there another must be READY first."""

    def __post_init__(self) -> None:
        share(leaving_share=self.leaving_share)

    def limit(self, snapshot: ClusterSnapshot, actions: Sequence[Action]) -> Verdict:
        states = snapshot.replica_by_id
        drained: Counter[str] = Counter()

        def limit(action: Action) -> tuple[Action | None, str]:
            if not isinstance(action, DrainReplica):
                return self._of(snapshot, action)
            state = states[action.replica_id]
            if state.phase is not Phase.READY:
                return action, ""
            room, why = self._spares(snapshot, snapshot.group_by_name[state.group])
            if drained[state.group] >= room:
                return None, why
            drained[state.group] += 1
            return action, ""

        return _each(actions, "DisruptionBudget", limit, lambda whole: self._of_all(snapshot, whole))

    def _spares(self, snapshot: ClusterSnapshot, group: Group) -> tuple[int, str]:
        """How many may be taken from it now: what is beyond its target, and its share of the others."""
        phases = [replica.phase for replica in snapshot.replicas_by_group[group.name]]
        ready, leaving = phases.count(Phase.READY), phases.count(Phase.DRAINING)
        most = math.floor(group.wanted * self.leaving_share)
        room = max(0, ready - group.wanted) + max(0, most - leaving - max(0, group.wanted - ready))
        return room, f"{ready} of the {group.wanted} wanted of {group.name} are READY, and {leaving} are leaving"

    def _of_all(self, snapshot: ClusterSnapshot, bundle: Sequence[ScaleRole]) -> str:
        """A rearrangement is judged by its groups together."""
        groups = [snapshot.group_by_name[action.group] for action in bundle]
        leaving = sum(max(0, group.wanted - action.replicas) for group, action in zip(groups, bundle, strict=True))
        leaving += sum(one.phase is Phase.DRAINING for group in groups for one in snapshot.replicas_by_group[group.name])
        most = max(1, math.floor(sum(group.wanted for group in groups) * self.leaving_share))
        return f"{leaving} would be leaving and {most} may" if leaving > most else ""

    def _of(self, snapshot: ClusterSnapshot, action: Action) -> tuple[Action | None, str]:
        if not isinstance(action, ScaleRole | ChangeRole):
            return action, ""
        group = snapshot.group_by_name[action.group if isinstance(action, ScaleRole) else action.source]
        leaving = sum(replica.phase is Phase.DRAINING for replica in snapshot.replicas_by_group[group.name])
        if isinstance(action, ChangeRole):
            leaving += sum(_changes_role(replica) for replica in snapshot.replicas_by_group[action.target])
        most = max(1, math.floor(group.wanted * self.leaving_share))
        room = max(0, most - leaving)
        why = f"{leaving} of {group.name} are leaving and {most} may"
        if isinstance(action, ChangeRole):
            return (action, "") if room > 0 else (None, why)
        least = group.wanted - room
        return (action, "") if action.replicas >= least else (_with(action, least), why)


def _changes_role(replica: ReplicaState) -> bool:
    """It served before, in another role."""
    return replica.phase is Phase.WARMING and replica.ready_since_s is not None


class Capacity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The pool's places beat every wish. Groups of one pool are served in the order of the actions."""

    def limit(self, snapshot: ClusterSnapshot, actions: Sequence[Action]) -> Verdict:
        places = {pool: sum(node.slots for node in snapshot.nodes if node.pool == pool and node.alive) for pool in _pools(snapshot)}
        for group in snapshot.groups:
            places[group.pool] -= group.wanted

        def fit(action: Action) -> tuple[Action | None, str]:
            if not isinstance(action, ScaleRole):
                return action, ""
            group = snapshot.group_by_name[action.group]
            most = max(min(group.wanted, action.replicas), group.wanted + max(0, places[group.pool]))
            granted = min(action.replicas, most)
            places[group.pool] -= max(0, granted - group.wanted)
            if granted < action.replicas:
                return _with(action, granted), f"pool {group.pool} has room for {granted} of {action.replicas}"
            return action, ""

        return _each(actions, "Capacity", fit)


def _pools(snapshot: ClusterSnapshot) -> set[str]:
    return {node.pool for node in snapshot.nodes} | {group.pool for group in snapshot.groups}


def _held(snapshot: ClusterSnapshot, action: Action, why: str) -> tuple[Action | None, str]:
    """The target in force instead of a new one; nothing instead of anything else."""
    if not isinstance(action, ScaleRole):
        return None, why
    wanted = snapshot.group_by_name[action.group].wanted
    return _with(action, wanted), why if wanted != action.replicas else ""


def _with(action: ScaleRole, replicas: int) -> ScaleRole:
    return msgspec.structs.replace(action, replicas=replicas)


def _each(
    actions: Sequence[Action],
    by: str,
    limit: Callable[[Action], tuple[Action | None, str]],
    limit_all: Callable[[Sequence[ScaleRole]], str] | None = None,
) -> Verdict:
    """`limit` answers with what may pass, if anything, and why it is less than was asked; an empty why means that it is not.

    limit_all: the same of the targets of one bundle together, which pass or do not.
    """
    passed: list[Action] = []
    dropped: list[Dropped] = []
    bundles: dict[str, list[ScaleRole]] = {}
    for action in actions:
        if limit_all is not None and isinstance(action, ScaleRole) and action.bundle:
            bundles.setdefault(action.bundle, []).append(action)
            continue
        allowed, why = limit(action)
        if allowed is not None:
            passed.append(allowed)
        if why:
            dropped.append(Dropped(action=action, by=by, why=why))
    for bundle in bundles.values():
        why = limit_all(bundle) if limit_all is not None else ""
        if why:
            dropped += [Dropped(action=action, by=by, why=why) for action in bundle]
        else:
            passed += bundle
    return Verdict(actions=tuple(passed), dropped=tuple(dropped))
