"""What the controller must not forget between passes. All of it is in the last snapshot and decision, and so in the journal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from cluster.actions import Decision, StartReplica
from cluster.performance import PerformanceModel
from cluster.snapshot import ClusterSnapshot, FailedStart, Group, Hold

FORGET_S = 3600.0  # Failed starts older than this say nothing about now.
SMOOTHING = 0.3  # Weight of the newest start in the measured start-up time: three starts outweigh what was before.


class GroupMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Of one group."""

    wanted: int
    startup_s: float | None = None
    """Measured; None before the first start."""
    slowdown: float = 1.0
    """Measured over predicted step time, of late."""
    performance: PerformanceModel | None = None
    """Of a replica, as the last one said."""
    changed_up_s: float | None = None
    changed_down_s: float | None = None


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Between two passes."""

    pass_number: int = 0
    """Of the pass to come."""
    next_replica: int = 0
    now_s: float = -math.inf
    """Of the last pass: time in snapshots never steps back, whatever the clock does."""
    groups: Mapping[str, GroupMemory] = {}
    holds: tuple[Hold, ...] = ()
    failed_starts: tuple[FailedStart, ...] = ()

    def of(self, group: str, least: int) -> GroupMemory:
        """A group seen for the first time is wanted as often as its config says."""
        return self.groups.get(group) or GroupMemory(wanted=least)


def after(memory: Memory, snapshot: ClusterSnapshot, decision: Decision, *, applied: bool) -> Memory:
    """Once a pass is decided. `applied`: whether its actions are carried out; if not, the targets in force stay."""
    starts = sum(isinstance(action, StartReplica) for action in decision.actions) if applied else 0
    targets = decision.targets if applied else {}
    return Memory(
        pass_number=snapshot.pass_number + 1,
        next_replica=snapshot.next_replica + starts,
        now_s=snapshot.now_s,
        groups={
            group.name: _after(memory, group, targets.get(group.name, group.wanted), snapshot.now_s) for group in snapshot.groups
        },
        holds=snapshot.holds,
        failed_starts=snapshot.failed_starts,
    )


def recovered(snapshot: ClusterSnapshot, decision: Decision, *, applied: bool) -> Memory:
    """After a restart: what the last journaled pass leaves. Its actions may or may not have been carried out; they are absolute."""
    groups = {
        group.name: GroupMemory(**{field: getattr(group, field) for field in GroupMemory.__struct_fields__})
        for group in snapshot.groups
    }
    return after(Memory(groups=groups), snapshot, decision, applied=applied)


def with_start(memory: Memory, group: str, took_s: float) -> Memory:
    """A replica of the group has become READY so long after its start."""
    known = memory.groups[group]
    startup_s = took_s if known.startup_s is None else known.startup_s + SMOOTHING * (took_s - known.startup_s)
    return _with_group(memory, group, msgspec.structs.replace(known, startup_s=round(startup_s, 3)))


def with_failed_starts(memory: Memory, failures: Sequence[FailedStart]) -> Memory:
    """Those that were not known; and without those of long ago."""
    if not failures:
        return memory
    now_s = max(one.at_s for one in failures)
    recent = (one for one in memory.failed_starts if now_s - one.at_s < FORGET_S)
    return msgspec.structs.replace(memory, failed_starts=tuple(dict.fromkeys((*recent, *failures))))


def with_hold(memory: Memory, hold: Hold) -> Memory:
    """An operator's word takes the place of an earlier one of its kind on its target."""
    others = (one for one in memory.holds if (one.kind, one.target) != (hold.kind, hold.target))
    return msgspec.structs.replace(memory, holds=(*others, hold))


def without_hold(memory: Memory, kinds: Iterable[str], target: str = "") -> Memory:
    left = (one for one in memory.holds if not (one.kind in tuple(kinds) and one.target == target))
    return msgspec.structs.replace(memory, holds=tuple(left))


def _after(memory: Memory, group: Group, target: int, now_s: float) -> GroupMemory:
    known = memory.of(group.name, group.wanted)
    return GroupMemory(
        wanted=target,
        startup_s=known.startup_s,
        slowdown=group.slowdown,
        performance=group.performance,
        changed_up_s=now_s if target > group.wanted else group.changed_up_s,
        changed_down_s=now_s if target < group.wanted else group.changed_down_s,
    )


def _with_group(memory: Memory, group: str, known: GroupMemory) -> Memory:
    return msgspec.structs.replace(memory, groups={**memory.groups, group: known})
