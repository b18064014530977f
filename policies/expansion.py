"""From targets to names: which replica starts where, and which one drains. Deterministic, so that replay and explanation cover it.

To remove, take those that do not serve yet, then those on spot nodes, then whoever holds the least KV. To add, take the living
node with the most room, in the zone that has the fewest of the group; equal ones in the order of their names.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from cluster.actions import Action, DrainReplica, Dropped, ScaleRole, StartReplica
from cluster.node import Market
from cluster.ranges import at_least
from cluster.replica import Phase
from cluster.snapshot import ClusterSnapshot, FailedStart, Group, ReplicaState

NAMED = 3  # In a reason; a whole node's replicas would fill a screen.
_SERVES_LATER = {Phase.STARTING: 0, Phase.WARMING: 1}


class Expansion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rules."""

    drain_s: float = 60.0
    """A draining replica may finish its streams for so long; what is left is resumed elsewhere. P99 of an 8B model's answers."""
    avoid_s: float = 30.0
    """A node on which a start failed is avoided for so long, twice as long after each further failure."""
    give_up_after: int = 5
    """Failures within `forget_s` after which a group starts nothing more until one is forgotten."""
    forget_s: float = 600.0

    def __post_init__(self) -> None:
        at_least(0.0, drain_s=self.drain_s, avoid_s=self.avoid_s, forget_s=self.forget_s)
        at_least(1, give_up_after=self.give_up_after)

    def expand(self, snapshot: ClusterSnapshot, actions: Sequence[Action]) -> tuple[tuple[Action, ...], tuple[Dropped, ...]]:
        """Each ScaleRole replaced by starts and drains. Others pass, in their order."""
        room = _Room(snapshot, self.avoided(snapshot))
        moved = {action.replica_id for action in actions if not isinstance(action, ScaleRole)}
        expanded: list[Action] = []
        dropped: list[Dropped] = []
        for action in actions:
            if not isinstance(action, ScaleRole):
                expanded.append(action)
                continue
            group = snapshot.group_by_name[action.group]
            # What is on a node that is to be emptied serves until another stands in for it.
            present = [
                replica
                for replica in snapshot.replicas_by_group[group.name]
                if replica.present and replica.replica_id not in moved and replica.node not in snapshot.drained
            ]
            missing = action.replicas - len(present)
            expanded += self._drains(snapshot, action, present, -missing)
            starts, why = self._starts(snapshot, _replacing(snapshot, action, group, len(present)), group, room, missing)
            expanded += starts
            if len(starts) < missing:
                why = f"{missing - len(starts)} of {missing} not started: {why}"
                dropped.append(Dropped(action=action, by=type(self).__name__, why=why))
        return tuple(expanded), tuple(dropped)

    def avoided(self, snapshot: ClusterSnapshot) -> frozenset[str]:
        """Nodes on which a start failed of late."""
        times = self._failures(snapshot, snapshot.failed_starts)
        return frozenset(node for node, at in times.items() if snapshot.now_s - max(at) < self.avoid_s * 2.0 ** (len(at) - 1))

    def _failures(self, snapshot: ClusterSnapshot, starts: Iterable[FailedStart]) -> dict[str, list[float]]:
        """Times by node. A node with many replicas fails once with all of them: what fails while it is avoided was begun before."""
        times: dict[str, list[float]] = {}
        for start in starts:
            known = times.setdefault(start.node, [])
            if snapshot.now_s - start.at_s < self.forget_s and (not known or start.at_s - known[-1] >= self.avoid_s):
                known.append(start.at_s)
        return {node: at for node, at in times.items() if at}

    def _starts(
        self, snapshot: ClusterSnapshot, action: ScaleRole, group: Group, room: _Room, count: int
    ) -> tuple[list[StartReplica], str]:
        mine = (one for one in snapshot.failed_starts if one.group == group.name)
        failures = sum(len(times) for times in self._failures(snapshot, mine).values())
        if failures >= self.give_up_after:
            return [], f"starts failed {failures} times within {self.forget_s:.0f} s"
        starts: list[StartReplica] = []
        for _ in range(count):
            node = room.take(group)
            if node is None:
                return starts, f"pool {group.pool} has no room on a living node that may be used"
            name = f"{group.role.value}-{group.pool}-{room.number()}"
            starts.append(StartReplica(replica_id=name, group=group.name, node=node, reason=action.reason, bundle=action.bundle))
        return starts, ""

    def _drains(
        self, snapshot: ClusterSnapshot, action: ScaleRole, present: Iterable[ReplicaState], count: int
    ) -> list[DrainReplica]:
        if count <= 0:
            return []
        leaving = sorted(present, key=lambda replica: removal_order(snapshot, replica))[:count]
        deadline_s = snapshot.now_s + self.drain_s
        return [
            DrainReplica(replica_id=one.replica_id, deadline_s=deadline_s, reason=action.reason, bundle=action.bundle)
            for one in leaving
        ]


def _replacing(snapshot: ClusterSnapshot, action: ScaleRole, group: Group, present: int) -> ScaleRole:
    """Where no target rises, what is started is what is missing."""
    if action.replicas != group.wanted:
        return action
    leaving = [one for one in snapshot.replicas_by_group[group.name] if one.present and one.node in snapshot.drained]
    lost = missing(snapshot, group, action.replicas - present - len(leaving))
    text = (
        f"{present} of the {action.replicas} that are wanted are there{_named('lost', lost)}{_named('to leave its node', leaving)}"
    )
    return msgspec.structs.replace(action, reason=msgspec.structs.replace(action.reason, text=text))


def _named(what: str, replicas: Sequence[ReplicaState]) -> str:
    """After a semicolon; nothing of none."""
    return f"; {what}: {', '.join(f'{one.replica_id} on {one.node}' for one in replicas[:NAMED])}" if replicas else ""


def missing(snapshot: ClusterSnapshot, group: Group, count: int) -> Sequence[ReplicaState]:
    """The last that a group has lost since its target rose, newest first: as many as it lacks, where so many are remembered."""
    since_s = group.changed_up_s or 0.0
    replicas = snapshot.replicas_by_group[group.name]
    lost = (replica for replica in replicas if replica.phase is Phase.LOST and replica.phase_since_s >= since_s)
    return sorted(lost, key=lambda replica: (-replica.phase_since_s, replica.replica_id))[: max(0, count)]


def removal_order(snapshot: ClusterSnapshot, replica: ReplicaState) -> tuple[int, bool, bool, int, float, str]:
    """Sorts first whoever is missed least."""
    node = snapshot.node_by_name.get(replica.node)
    return (
        _SERVES_LATER.get(replica.phase, 2),
        replica.node not in snapshot.cordoned,
        node is None or node.market is not Market.SPOT,
        replica.load.kv_blocks_used if replica.load else 0,
        -replica.phase_since_s,
        replica.replica_id,
    )


class _Room:
    """Places and numbers not yet given away in this pass."""

    def __init__(self, snapshot: ClusterSnapshot, avoided: frozenset[str]) -> None:
        nodes = snapshot.node_by_name
        self._next = snapshot.next_replica
        self._free: dict[str, dict[str, list[tuple[int, str]]]] = {}
        """By pool and zone: a heap of nodes, whoever has the most places left first."""
        for name, free in sorted(snapshot.free_slots.items()):
            if free > 0 and name not in snapshot.cordoned | avoided:
                zones = self._free.setdefault(nodes[name].pool, {})
                zones.setdefault(nodes[name].zone, []).append((-free, name))
        for heap in (heap for zones in self._free.values() for heap in zones.values()):
            heapq.heapify(heap)
        self._zones: dict[str, Counter[str]] = {}
        for replica in snapshot.replicas:
            if replica.present and replica.node in nodes:
                self._zones.setdefault(replica.group, Counter())[nodes[replica.node].zone] += 1

    def take(self, group: Group) -> str | None:
        """The best node for one more of the group, None if there is none."""
        there = self._zones.setdefault(group.name, Counter())
        heaps = self._free.get(group.pool, {})
        if not heaps:
            return None
        zone = min(heaps, key=lambda zone: (there[zone], heaps[zone][0]))
        there[zone] += 1
        taken, name = heapq.heappop(heaps[zone])
        if taken < -1:
            heapq.heappush(heaps[zone], (taken + 1, name))
        if not heaps[zone]:
            del heaps[zone]
        return name

    def number(self) -> int:
        self._next += 1
        return self._next - 1
