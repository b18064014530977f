"""What would have turned a decision: each lever moved until deciding again gives another outcome for the group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import msgspec

from cluster.actions import Action, ChangeRole, Decision, Dropped, ScaleRole
from cluster.snapshot import ClusterSnapshot
from policies.expansion import Expansion
from policies.levers import UNITS, read, write

REACH = 32.0  # Times more, and times less, than the value that was: further away nobody calls it a near miss.
STEPS = 40  # In which it is gone through, geometrically: a region narrower than a fifth of the value may be stepped over.
SHARP = 0.002  # Of the distance, to which a turning point is found before it is rounded.
NEARLY = 0.99  # Of the way to the stated value the outcome is still as it was.
DIGITS = 17  # Tell any two floats apart.

Decide = Callable[[ClusterSnapshot], Decision]


class Unnamed(Expansion, frozen=True, kw_only=True):
    """Leaves wishes as they are. No outcome hangs on names, and to give a thousand of them takes longer than to decide."""

    def expand(self, snapshot: ClusterSnapshot, actions: Sequence[Action]) -> tuple[tuple[Action, ...], tuple[Dropped, ...]]:
        return tuple(actions), ()


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


class Counterfactual:
    """One snapshot, decided again and again with one number changed. What was decided for one group is known for all."""

    def __init__(self, decide: Decide, snapshot: ClusterSnapshot) -> None:
        self._decide, self._snapshot = decide, snapshot
        self._base = decide(snapshot)
        self._known: dict[tuple[str, float], Decision] = {}

    def flips(self, group: str, levers: Iterable[str]) -> tuple[Flip, ...]:
        """The nearest turning point of each lever that has one, nearest first."""
        found = (self.nearest(group, lever) for lever in levers)
        return tuple(sorted((flip for flip in found if flip is not None), key=lambda flip: flip.distance))

    def nearest(self, group: str, lever: str) -> Flip | None:
        """Where the outcome for a group turns first as a lever moves away from what it was; None within its reach."""
        was = read(self._snapshot, lever)
        if not was:
            return None
        base = outcome(self._base, group)

        def turned(value: float) -> bool:
            return self._outcome(group, lever, value) != base

        ratio = REACH ** (1.0 / STEPS)
        for step in range(1, STEPS + 1):
            for sign in (1, -1):
                same, other = was * ratio ** (sign * (step - 1)), was * ratio ** (sign * step)
                if turned(other):
                    value = _stated(turned, was, same, other)
                    unit = UNITS[lever.partition(" of ")[0]]
                    return Flip(lever=lever, unit=unit, was=was, turns_at=value, outcome=self._outcome(group, lever, value))
        return None

    def _outcome(self, group: str, lever: str, value: float) -> str:
        if (lever, value) not in self._known:
            self._known[lever, value] = self._decide(write(self._snapshot, lever, value))
        return outcome(self._known[lever, value], group)


def flips(decide: Decide, snapshot: ClusterSnapshot, group: str, levers: Iterable[str]) -> tuple[Flip, ...]:
    """The nearest turning point of each lever that has one, nearest first."""
    return Counterfactual(decide, snapshot).flips(group, levers)


def outcome(decision: Decision, group: str) -> str:
    """What was decided for a group, in words that differ when the decision does."""
    changes = [action for action in decision.actions if isinstance(action, ChangeRole) and group in (action.source, action.target)]
    words = [f"{action.replica_id} becomes {action.role.value}" for action in changes]
    return ", ".join([replicas(decision.targets.get(group, 0)), *words])


def replicas(count: int) -> str:
    """In words."""
    return "1 replica" if count == 1 else f"{count} replicas"


def asked(decision: Decision, group: str) -> ScaleRole | ChangeRole | None:
    """The wish that decided about a group; None where the pass did nothing."""
    wishes = (wish for wish in decision.wishes if isinstance(wish, ScaleRole | ChangeRole))
    return next((wish for wish in wishes if group in wish.claims), None)


def _stated(turned: Callable[[float], bool], was: float, same: float, other: float) -> float:
    """A short number at which the outcome has turned, and 99 % of the way there has not: what is stated is true as it is read."""
    while True:
        same, other = _sharpened(turned, was, same, other)
        nearly = was + NEARLY * (other - was)
        if not turned(nearly):
            break
        same, other = was, nearly  # A nearer region, that was stepped over.
    value = _roundest(other, was + (same - was) / NEARLY)
    return value if turned(value) and not turned(was + NEARLY * (value - was)) else other


def _sharpened(turned: Callable[[float], bool], was: float, same: float, other: float) -> tuple[float, float]:
    """A value at which the outcome has not turned, and close behind it one at which it has."""
    while abs(other - same) > SHARP * abs(other - was):
        middle = (same + other) / 2
        if middle in (same, other):
            break
        same, other = (same, middle) if turned(middle) else (middle, other)
    return same, other


def _roundest(one: float, another: float) -> float:
    """The number of fewest digits between two positive ones; the first where they leave no room."""
    low, high = sorted((one, another))
    for digits in range(1, DIGITS):
        step = 10.0 ** (math.floor(math.log10(high)) - digits + 1)
        value = float(f"{math.ceil(low / step) * step:.{digits}g}")
        if low <= value <= high:
            return value
    return one
