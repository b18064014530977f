"""Why: a journaled pass, or a replica's or group's part in it, as one answer with its numbers and what would have turned it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from cluster.actions import Action, ChangeRole, DrainReplica, StartReplica
from cluster.errors import InvalidRequest
from controller.journal import Entry, Journal, Outcome
from controller.pipelines import from_text
from policies.counterfactual import Flip, asked, flips, outcome


class GroupAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """One group in one pass."""

    group: str
    before: int
    after: int
    outcome: str
    why: str
    numbers: Mapping[str, float]
    runner_up: str
    actions: tuple[str, ...]
    """What was done for it, each with what became of it where that is known."""
    objections: tuple[str, ...]
    """What else was proposed, and what stood in its way."""
    flips: tuple[Flip, ...]
    """Nearest first."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One pass."""

    number: int
    at_s: float
    epoch: int
    mode: str
    failed: str
    groups: tuple[GroupAnswer, ...]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A pass that is not decided as it was."""

    number: int
    recorded: str
    again: str


def explain(journal: Journal, number: int, only: str | None = None) -> Answer:
    """A pass. `only`: a group's name, a role, or a replica's id; else all groups with actions, or all if there are none.

    Raises InvalidRequest where the journal has no such pass or the pass no such group or replica.
    """
    try:
        entry = journal.entry(number)
    except KeyError:
        raise InvalidRequest(f"pass {number} is not in the journal", param="pass") from None
    outcomes = {one.action: one for one in journal.outcomes(number)}
    names = _names(entry, only)
    groups = tuple(_group(entry, name, outcomes) for name in names)
    return Answer(
        number=number, at_s=entry.snapshot.now_s, epoch=entry.epoch, mode=entry.mode, failed=entry.decision.failed, groups=groups
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


def _as_recorded(decision: object) -> object:
    """Through the journal's encoding and back: whole numbers in fields of floats become floats."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(decision), type=type(decision))


def _names(entry: Entry, only: str | None) -> list[str]:
    snapshot, decision = entry.snapshot, entry.decision
    if only is None:
        touched = {name for action in decision.actions for name in _groups_of(entry, action)}
        return sorted(touched) or [group.name for group in snapshot.groups]
    of_replica = {replica.group for replica in snapshot.replicas if replica.replica_id == only}
    of_replica |= {name for action in decision.actions if only in action.claims for name in _groups_of(entry, action)}
    of_role = {group.name for group in snapshot.groups if only in (group.name, group.role.value)}
    if not of_replica | of_role:
        known = ", ".join(group.name for group in snapshot.groups)
        raise InvalidRequest(f"{only} is no replica, role or group of pass {entry.number}; groups are {known}", param="only")
    return sorted(of_replica | of_role)


def _groups_of(entry: Entry, action: Action) -> tuple[str, ...]:
    match action:
        case ChangeRole():
            return (action.source, action.target)
        case StartReplica():
            return (action.group,)
        case DrainReplica():
            return tuple(one.group for one in entry.snapshot.replicas if one.replica_id == action.replica_id)
        case _:
            return action.claims


def _group(entry: Entry, name: str, outcomes: Mapping[int, Outcome]) -> GroupAnswer:
    snapshot, decision = entry.snapshot, entry.decision
    wish = asked(decision, name)
    done = [(index, action) for index, action in enumerate(decision.actions) if name in _groups_of(entry, action)]
    turned = flips(from_text(entry.pipeline).decide, snapshot, name, wish.reason.levers) if wish else ()
    return GroupAnswer(
        group=name,
        before=snapshot.group_by_name[name].wanted,
        after=decision.targets.get(name, snapshot.group_by_name[name].wanted),
        outcome=outcome(decision, name),
        why=wish.reason.text if wish else decision.failed,
        numbers=wish.reason.numbers if wish else {},
        runner_up=wish.reason.runner_up if wish else "",
        actions=tuple(f"{_said(action)}: {_became(outcomes.get(index))}" for index, action in done),
        objections=tuple(f"{one.by}: {one.why}" for one in decision.dropped if name in one.action.claims),
        flips=turned,
    )


def _said(action: Action) -> str:
    match action:
        case StartReplica():
            return f"start {action.replica_id} on {action.node}"
        case DrainReplica():
            return f"drain {action.replica_id}"
        case ChangeRole():
            return f"{action.replica_id} becomes {action.role.value}"
        case _:
            return f"{action.group} to {action.replicas}"


def _became(known: Outcome | None) -> str:
    return "under way" if known is None else known.outcome
