"""Why: a journaled pass, or a replica's or group's part in it, as one answer with its numbers and what would have turned it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from cluster.actions import Action, Decision, Dropped
from cluster.errors import InvalidRequest
from controller.journal import Entry, Journal, Outcome, groups_of, node_of
from controller.pipelines import from_text
from policies.counterfactual import Counterfactual, Flip, Unnamed, asked, outcome
from policies.expansion import missing

MOST_TURNED = 6  # Groups whose turning points are looked for unasked: at a thousand replicas of many models each takes a second.
ALIKE = 0.6  # Of two names, above which one may be a slip of the pen for the other.
MOST_LIKE = 3

Told = Callable[[int, int], None]
"""Told how many levers of how many have been turned."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """An action, and what became of it."""

    action: str
    why: str
    became: str
    """`done`, what went wrong, or `under way`; where nothing is carried out, `only advised`."""
    took_s: float | None = None
    """From the decision; None where nothing has become of it."""


class Objection(msgspec.Struct, frozen=True, kw_only=True):
    """A proposal that is not carried out, or not as proposed."""

    proposal: str
    reason: str
    """Why it was proposed."""
    by: str
    why: str
    """What stood in its way."""


class GroupAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One group in one pass."""

    group: str
    before: int
    after: int
    present: int
    """Replicas that served or were about to."""
    missing: tuple[str, ...]
    """Those that were lost and are not made up for, each with its node."""
    outcome: str
    why: str
    numbers: Mapping[str, float]
    runner_up: str
    actions: tuple[Step, ...]
    dropped: tuple[Objection, ...]
    flips: tuple[Flip, ...]
    """Nearest first."""
    unturned: tuple[str, ...]
    """Levers that turn nothing within their reach."""
    sought: bool
    """Whether turning points were looked for: of all groups asked for by name, else of the first `MOST_TURNED`."""
    window_s: float
    """The time before the pass over which demand and lengths are means; 0 where nothing is known of them."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One pass."""

    number: int
    at_s: float
    epoch: int
    mode: str
    failed: str
    """Why nothing was decided; empty otherwise."""
    groups: tuple[GroupAnswer, ...]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A pass that is not decided as it was."""

    number: int
    recorded: str
    again: str


def explain(journal: Journal, number: int, only: str | None = None, *, told: Told = lambda done, of: None) -> Answer:
    """A pass. Without `only`, of all groups that something was done or dropped for, or of all.

    only: a group's name, a role, a replica's id or a node's name. Raises InvalidRequest where the journal has no such pass or the
    pass no such thing.
    """
    try:
        entry = journal.entry(number)
    except KeyError:
        raise InvalidRequest(f"pass {number} is not in the journal", param="pass") from None
    parts = [_Part(entry, name, only) for name in _names(entry, only)]
    sought = [] if entry.decision.failed else parts if only is not None else parts[:MOST_TURNED]
    turned = _turned(entry, sought, told)
    outcomes = {one.action: one for one in journal.outcomes(number)}
    return Answer(
        number=number,
        at_s=entry.snapshot.now_s,
        epoch=entry.epoch,
        mode=entry.mode,
        failed=entry.decision.failed,
        groups=tuple(part.answer(outcomes, turned.get(part.name)) for part in parts),
    )


def replay(journal: Journal) -> Iterator[tuple[int, Difference | None]]:
    """Decide every pass again: its number, and how it differs if it does. Raises InvalidConfig for pipelines unknown here."""
    pipelines = {}
    for entry in journal.entries():
        if entry.pipeline not in pipelines:
            pipelines[entry.pipeline] = from_text(entry.pipeline)
        again = pipelines[entry.pipeline].decide(entry.snapshot)
        recorded, now = msgspec.json.encode(entry.decision), msgspec.json.encode(_as_recorded(again))
        differs = recorded != now
        yield entry.number, Difference(number=entry.number, recorded=recorded.decode(), again=now.decode()) if differs else None


def reason_of(decision: Decision, group: str) -> str:
    """Why a group's target is what it is, in a line."""
    wish = asked(decision, group)
    if wish is not None:
        return wish.reason.text
    return f"the pass did nothing: {decision.failed}" if decision.failed else "nothing that was proposed for it went through"


class _Part:
    """A group's part in a pass."""

    def __init__(self, entry: Entry, name: str, only: str | None) -> None:
        snapshot, decision = entry.snapshot, entry.decision
        self._entry, self._name = entry, name
        self._wish = asked(decision, name)
        mine = [(index, one) for index, one in enumerate(decision.actions) if name in groups_of(snapshot, one)]
        of_replica = [
            (index, one)
            for index, one in mine
            if only is not None and only != name and only in (*one.claims, node_of(snapshot, one))
        ]
        self._actions = of_replica or mine
        self._dropped = [one for one in decision.dropped if name in groups_of(snapshot, one.action)]

    @property
    def name(self) -> str:
        return self._name

    @property
    def levers(self) -> tuple[str, ...]:
        """Of the wish that went through; else of all that did not."""
        if self._wish is not None:
            return self._wish.reason.levers
        return tuple(dict.fromkeys(lever for one in self._dropped for lever in one.action.reason.levers))

    def answer(self, outcomes: Mapping[int, Outcome], flips: Sequence[Flip] | None) -> GroupAnswer:
        """`flips`: None where they were not looked for."""
        snapshot, decision, reason = self._entry.snapshot, self._entry.decision, self._wish and self._wish.reason
        before = snapshot.group_by_name[self._name].wanted
        present = sum(replica.present for replica in snapshot.replicas_by_group[self._name])
        turning = {flip.lever for flip in flips or ()}
        workload = snapshot.workload_by_model.get(snapshot.group_by_name[self._name].model)
        return GroupAnswer(
            group=self._name,
            before=before,
            after=decision.targets.get(self._name, before),
            present=present,
            missing=self._missing(present),
            outcome=outcome(decision, self._name),
            why=reason_of(decision, self._name),
            numbers=reason.numbers if reason else {},
            runner_up=reason.runner_up if reason else "",
            actions=tuple(self._step(action, outcomes.get(index)) for index, action in self._actions),
            dropped=tuple(_objection(one) for one in self._dropped),
            flips=tuple(flips or ()),
            unturned=() if flips is None else tuple(lever for lever in self.levers if lever not in turning),
            sought=flips is not None,
            window_s=len(workload.buckets) * workload.bucket_s if workload else 0.0,
        )

    def _missing(self, present: int) -> tuple[str, ...]:
        snapshot = self._entry.snapshot
        group = snapshot.group_by_name[self._name]
        dead = {node.name for node in snapshot.nodes if not node.alive}
        lost = missing(snapshot, group, group.wanted - present)
        return tuple(f"{one.replica_id} on {one.node}" + (", which does not answer" if one.node in dead else "") for one in lost)

    def _step(self, action: Action, known: Outcome | None) -> Step:
        became = "only advised" if self._entry.mode == "advise" else "under way"
        return Step(
            action=action.words,
            why=action.reason.text,
            became=became if known is None else known.outcome,
            took_s=None if known is None else round(known.at_s - self._entry.snapshot.now_s, 3),
        )


def _turned(entry: Entry, parts: Sequence[_Part], told: Told) -> dict[str, Sequence[Flip]]:
    """The flips of each part, by its name."""
    if not parts:
        return {}
    pipeline = msgspec.structs.replace(from_text(entry.pipeline), expansion=Unnamed())
    counterfactual = Counterfactual(pipeline.decide, entry.snapshot)
    turns = [(part.name, lever) for part in parts for lever in part.levers]
    found: dict[str, list[Flip]] = {part.name: [] for part in parts}
    for done, (name, lever) in enumerate(turns):
        told(done, len(turns))
        found[name] += counterfactual.flips(name, (lever,))
    return {name: sorted(flips, key=lambda flip: flip.distance) for name, flips in found.items()}


def _as_recorded(decision: Decision) -> Decision:
    """Through the journal's encoding and back: whole numbers in fields of floats become floats."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(decision), type=Decision)


def _names(entry: Entry, only: str | None) -> list[str]:
    """The groups to tell about, in order."""
    snapshot, decision = entry.snapshot, entry.decision
    if only is None:
        touched = {name for action in decision.actions for name in groups_of(snapshot, action)}
        stopped = {name for one in decision.dropped for name in groups_of(snapshot, one.action)} - touched
        return [*sorted(touched), *sorted(stopped)] or [group.name for group in snapshot.groups]
    of_replica = {replica.group for replica in snapshot.replicas if replica.replica_id == only}
    about = [action for action in decision.actions if only in (*action.claims, node_of(snapshot, action))]
    of_replica |= {name for action in about for name in groups_of(snapshot, action)}
    of_role = {group.name for group in snapshot.groups if only in (group.name, group.role.value)}
    found = of_replica | of_role or {replica.group for replica in snapshot.replicas if replica.node == only}
    if not found and only not in snapshot.node_by_name:
        raise InvalidRequest(_unknown(entry, only), param="only")
    return sorted(found)


def _unknown(entry: Entry, name: str) -> str:
    snapshot = entry.snapshot
    groups = [group.name for group in snapshot.groups]
    known = [*groups, *{group.role.value for group in snapshot.groups}, *(one.replica_id for one in snapshot.replicas)]
    known += [node.name for node in snapshot.nodes]
    near = difflib.get_close_matches(name, known, MOST_LIKE, ALIKE)
    meant = f"; near it are {', '.join(near)}" if near else ""
    return f"{name} is no replica, role, group or node of pass {entry.number}{meant}; groups are {', '.join(groups)}"


def _objection(one: Dropped) -> Objection:
    return Objection(proposal=one.action.words, reason=one.action.reason.text, by=one.by, why=one.why)
