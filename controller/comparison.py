"""Challengers beside the policy that acts: where they would have decided otherwise on the same snapshots, and at what price.

Every snapshot is one that the acting policy's decisions have led to. A challenger's targets are what it would have wanted then and
there, not what would have come of following it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from cluster.actions import Decision
from cluster.snapshot import ClusterSnapshot
from controller.explanation import reason_of
from controller.journal import Journal
from policies.counterfactual import outcome
from policies.pipeline import Pipeline

AWAY_S = 60.0  # Between two passes; in a longer gap the controller was away, and nobody's targets count on.
PRICES_EVERY = 60  # Passes: as often as the journal keeps a whole snapshot.


class Pass(msgspec.Struct, frozen=True, kw_only=True):
    """What each decided on one snapshot."""

    number: int
    at_s: float
    acting: Decision
    challengers: Mapping[str, Decision]
    prices: Mapping[str, float]
    """USD per replica-hour, by group."""


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """What one policy wanted of one group."""

    mean_replicas: float
    """Over time."""
    replica_hours: float
    usd: float
    """By the nodes' prices, each shared evenly by its slots; 0 where nodes have none."""
    changes: int
    """Passes in which it wanted another number than in the pass before."""


class Divergence(msgspec.Struct, frozen=True, kw_only=True):
    """Two decisions on one snapshot, each with its reason."""

    number: int
    at_s: float
    acting: str
    acting_why: str
    challenger: str
    challenger_why: str


class GroupComparison(msgspec.Struct, frozen=True, kw_only=True):
    """A challenger on one group, beside the policy that acts."""

    challenger: str
    group: str
    passes: int
    differing: int
    """Passes with another outcome for the group."""
    acting: Use
    proposed: Use
    first: Divergence | None
    """None where they never differ."""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All challengers over a part of a journal."""

    since_s: float
    until_s: float
    passes: int
    groups: tuple[GroupComparison, ...]
    """By challenger, then by group."""


def recorded(journal: Journal, since_s: float) -> Iterator[Pass]:
    """What was journaled in shadow."""
    prices: Mapping[str, float] = {}
    for count, choice in enumerate(journal.choices(since_s)):
        if count % PRICES_EVERY == 0:
            prices = prices_of(journal.keyframe(choice.number))
        yield Pass(number=choice.number, at_s=choice.at_s, acting=choice.decision, challengers=choice.shadows, prices=prices)


def redecided(journal: Journal, since_s: float, name: str, pipeline: Pipeline) -> Iterator[Pass]:
    """What a pipeline decides on the recorded snapshots."""
    first = journal.first_since(since_s)
    for entry in journal.entries(first) if first is not None else ():
        yield Pass(
            number=entry.number,
            at_s=entry.snapshot.now_s,
            acting=entry.decision,
            challengers={name: pipeline.decide(entry.snapshot)},
            prices=prices_of(entry.snapshot),
        )


def compare(passes: Iterable[Pass]) -> Comparison:
    """Totals of the passes, which are in order. Those in which a challenger had no say do not count for it."""
    sums: dict[tuple[str, str], _Sum] = {}
    count, since_s, until_s = 0, 0.0, 0.0
    for one in passes:
        span_s = one.at_s - until_s if count else 0.0
        for challenger, decision in one.challengers.items():
            for group in sorted({*one.acting.targets, *decision.targets}):
                total = sums.setdefault((challenger, group), _Sum(challenger, group))
                total.add(one, decision, span_s if span_s <= AWAY_S else 0.0)
        since_s, until_s, count = since_s if count else one.at_s, one.at_s, count + 1
    groups = tuple(sums[key].total() for key in sorted(sums))
    return Comparison(since_s=since_s, until_s=until_s, passes=count, groups=groups)


def prices_of(snapshot: ClusterSnapshot) -> dict[str, float]:
    """USD per replica-hour, by group: the mean over the pool's places on living nodes."""
    usd: dict[str, float] = {}
    slots: dict[str, int] = {}
    for node in snapshot.nodes:
        if node.alive:
            usd[node.pool] = usd.get(node.pool, 0.0) + node.price_usd_per_hour
            slots[node.pool] = slots.get(node.pool, 0) + node.slots
    return {group.name: usd.get(group.pool, 0.0) / (slots.get(group.pool) or 1) for group in snapshot.groups}


class _Wanted:
    """One policy's targets for one group, from the pass before on until the next."""

    def __init__(self) -> None:
        self._target: int | None = None
        self._seconds = self._replica_seconds = self._usd_seconds = 0.0
        self._changes = 0

    def add(self, target: int, price: float, span_s: float) -> None:
        """`span_s`: since the pass before, in which its target was in force."""
        if self._target is not None:
            self._seconds += span_s
            self._replica_seconds += self._target * span_s
            self._usd_seconds += self._target * span_s * price
            self._changes += target != self._target
        self._target = target

    def use(self) -> Use:
        return Use(
            mean_replicas=self._replica_seconds / self._seconds if self._seconds else float(self._target or 0),
            replica_hours=self._replica_seconds / 3600,
            usd=self._usd_seconds / 3600,
            changes=self._changes,
        )


class _Sum:
    """Of one challenger and one group."""

    def __init__(self, challenger: str, group: str) -> None:
        self._challenger, self._group = challenger, group
        self._acting, self._proposed = _Wanted(), _Wanted()
        self._passes = self._differing = 0
        self._first: Divergence | None = None

    def add(self, one: Pass, decision: Decision, span_s: float) -> None:
        price = one.prices.get(self._group, 0.0)
        self._acting.add(one.acting.targets.get(self._group, 0), price, span_s)
        self._proposed.add(decision.targets.get(self._group, 0), price, span_s)
        self._passes += 1
        acting, challenger = outcome(one.acting, self._group), outcome(decision, self._group)
        if acting == challenger:
            return
        self._differing += 1
        self._first = self._first or Divergence(
            number=one.number,
            at_s=one.at_s,
            acting=acting,
            acting_why=reason_of(one.acting, self._group),
            challenger=challenger,
            challenger_why=reason_of(decision, self._group),
        )

    def total(self) -> GroupComparison:
        return GroupComparison(
            challenger=self._challenger,
            group=self._group,
            passes=self._passes,
            differing=self._differing,
            acting=self._acting.use(),
            proposed=self._proposed.use(),
            first=self._first,
        )
