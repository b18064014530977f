"""From a snapshot to a decision: policies in order, conflicts, guards in order, names.

Same snapshot, same decision, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec

from cluster.actions import Action, ChangeRole, Decision, Dropped, ScaleRole
from cluster.snapshot import ClusterSnapshot
from policies.expansion import Expansion
from policies.policy import Guard, Policy, Verdict

Answer = TypeVar("Answer")


ROUNDS = 8  # Each gives back the claims of what the guards stopped; more than a few policies do not fight over.


class Pipeline(msgspec.Struct, frozen=True, kw_only=True):
    """A set of policies and guards. Emergency policies go first, otherwise the order is as given."""

    policies: tuple[Policy, ...]
    guards: tuple[Guard, ...]
    expansion: Expansion = Expansion()

    def decide(self, snapshot: ClusterSnapshot) -> Decision:
        """A policy or guard that raises makes the whole pass do nothing, and says so.

        What guards stop altogether gives its claims back, and the policies are asked again without it.
        """
        refused: list[Dropped] = []
        try:
            for _ in range(ROUNDS):
                proposed, lost = self._proposed(snapshot, refused)
                accepted, stopped = self._limited(snapshot, proposed)
                gone = _gone(proposed, accepted)
                given_back = [one for one in stopped if _kind(one.action) in gone]
                if not given_back:
                    break
                refused += given_back
            actions, unplaced = _at(self.expansion, self.expansion.expand, snapshot, accepted)
        except _StageFailed as failure:
            return Decision(failed=str(failure), targets={group.name: group.wanted for group in snapshot.groups})
        dropped = (*refused, *lost, *(one for one in stopped if _kind(one.action) not in gone), *unplaced)
        return Decision(wishes=tuple(accepted), targets=_targets(snapshot, accepted), actions=actions, dropped=dropped)

    def _proposed(self, snapshot: ClusterSnapshot, refused: Sequence[Dropped]) -> tuple[list[Action], list[Dropped]]:
        """What the policies want, without what was refused before and what claims what is claimed."""
        never = {_kind(one.action) for one in refused}
        accepted: list[Action] = []
        claimed: dict[str, str] = {}
        lost: list[Dropped] = []
        for policy in sorted(self.policies, key=lambda policy: not policy.emergency):
            wishes = _at(policy, policy.decide, snapshot, tuple(accepted))
            _accept([wish for wish in wishes if _kind(wish) not in never], name_of(policy), accepted, claimed, lost)
        return accepted, lost

    def _limited(self, snapshot: ClusterSnapshot, actions: list[Action]) -> tuple[list[Action], list[Dropped]]:
        stopped: list[Dropped] = []
        for guard in self.guards:
            actions, more = _without_broken(_at(guard, guard.limit, snapshot, tuple(actions)))
            stopped += more
        return actions, stopped


class _StageFailed(Exception):
    """A policy or guard raised."""


def _at(stage: object, call: Callable[..., Answer], *arguments: object) -> Answer:
    try:
        return call(*arguments)
    except Exception as error:
        raise _StageFailed(f"{name_of(stage)}: {error!r}") from error


def name_of(stage: object) -> str:
    return type(stage).__name__


def _kind(action: Action) -> tuple[str, tuple[str, ...], str]:
    """Alike for proposals for the same: the guards say the same of them."""
    return (type(action).__name__, action.claims, action.bundle)


def _gone(proposed: Iterable[Action], kept: Iterable[Action]) -> set[tuple[str, tuple[str, ...], str]]:
    return {_kind(action) for action in proposed} - {_kind(action) for action in kept}


def _accept(proposed: Iterable[Action], by: str, accepted: list[Action], claimed: dict[str, str], lost: list[Dropped]) -> None:
    """Add what claims nothing that is claimed; a bundle is added whole or not at all. `claimed`: by whom."""
    for bundle in _bundles(proposed):
        rivals = {claim: claimed[claim] for action in bundle for claim in action.claims if claim in claimed}
        if not rivals:
            accepted += bundle
            claimed.update({claim: by for action in bundle for claim in action.claims})
            continue
        claim, rival = min(rivals.items())
        lost += [Dropped(action=action, by=rival, why=f"{claim} is claimed before {by}") for action in bundle]


def _bundles(actions: Iterable[Action]) -> list[list[Action]]:
    """What stands and falls together, in the order of each bundle's first action."""
    found: dict[object, list[Action]] = {}
    for index, action in enumerate(actions):
        found.setdefault(action.bundle or index, []).append(action)
    return list(found.values())


def _without_broken(verdict: Verdict) -> tuple[list[Action], list[Dropped]]:
    """What a guard let pass, without the bundles of which it stopped or weakened an action."""
    broken = {one.action.bundle for one in verdict.dropped} - {""}
    kept = [action for action in verdict.actions if action.bundle not in broken]
    told = {_kind(one.action) for one in verdict.dropped}
    followers = [action for action in verdict.actions if action.bundle in broken and _kind(action) not in told]
    more = [
        Dropped(action=action, by=verdict.dropped[0].by, why=f"bundle {action.bundle} has lost another action")
        for action in followers
    ]
    return kept, [*verdict.dropped, *more]


def _targets(snapshot: ClusterSnapshot, actions: Iterable[Action]) -> dict[str, int]:
    targets = {group.name: group.wanted for group in snapshot.groups}
    for action in actions:
        match action:
            case ScaleRole():
                targets[action.group] = action.replicas
            case ChangeRole():
                targets[action.source] -= 1
                targets[action.target] += 1
    return targets
