"""What would have turned a decision: each lever moved until deciding again gives another outcome for the group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import msgspec

from cluster.actions import ChangeRole, Decision, ScaleRole
from cluster.snapshot import ClusterSnapshot
from policies.levers import UNITS, read, write

REACH = 32.0  # Times more, and times less, than the value that was: further away nobody calls it a near miss.
STEPS = 40  # In which it is gone through, geometrically: a region narrower than a fifth of the value may be stepped over.
SHARP = 0.004  # Of the distance: the stated value turns it, and 99 % of the way there does not.

Decide = Callable[[ClusterSnapshot], Decision]


class Flip(msgspec.Struct, frozen=True, kw_only=True):
    """One number that, changed alone, would have changed the outcome."""

    lever: str
    unit: str
    was: float
    turns_at: float
    outcome: str
    """What would have been decided then."""

    @property
    def distance(self) -> float:
        """How far away, as a factor above 1."""
        return max(self.was / self.turns_at, self.turns_at / self.was)


def flips(decide: Decide, snapshot: ClusterSnapshot, group: str, levers: Iterable[str]) -> tuple[Flip, ...]:
    """The nearest turning point of each lever that has one, nearest first."""
    found = (_nearest(decide, snapshot, group, lever) for lever in levers)
    return tuple(sorted((flip for flip in found if flip is not None), key=lambda flip: flip.distance))


def outcome(decision: Decision, group: str) -> str:
    """What was decided for a group, in words that differ when the decision does."""
    changes = [action for action in decision.actions if isinstance(action, ChangeRole) and group in (action.source, action.target)]
    words = [f"{action.replica_id} becomes {action.role.value}" for action in changes]
    return ", ".join([f"{decision.targets.get(group, 0)} replicas", *words])


def asked(decision: Decision, group: str) -> ScaleRole | ChangeRole | None:
    """The wish that decided about a group; None where the pass did nothing."""
    wishes = (wish for wish in decision.wishes if isinstance(wish, ScaleRole | ChangeRole))
    return next((wish for wish in wishes if group in wish.claims), None)


def _nearest(decide: Decide, snapshot: ClusterSnapshot, group: str, lever: str) -> Flip | None:
    was = read(snapshot, lever)
    if not was:
        return None
    base = outcome(decide(snapshot), group)

    def at(factor: float) -> str:
        return outcome(decide(write(snapshot, lever, was * factor)), group)

    ratio = REACH ** (1.0 / STEPS)
    for step in range(1, STEPS + 1):
        for sign in (1, -1):
            same, other = ratio ** (sign * (step - 1)), ratio ** (sign * step)
            if at(other) != base:
                turns_at = was * _sharpened(at, base, same, other)
                return Flip(
                    lever=lever,
                    unit=UNITS[lever.partition(" of ")[0]],
                    was=was,
                    turns_at=turns_at,
                    outcome=outcome(decide(write(snapshot, lever, turns_at)), group),
                )
    return None


def _sharpened(at: Callable[[float], str], base: str, same: float, other: float) -> float:
    """A factor at which the outcome differs, next to one at which it does not."""
    while abs(other - same) > SHARP * abs(other - 1.0):
        middle = (same + other) / 2
        if math.isclose(middle, same) or math.isclose(middle, other):
            break
        same, other = (middle, other) if at(middle) == base else (same, middle)
    return other
