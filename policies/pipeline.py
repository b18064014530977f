"""From a snapshot to a decision: policies in order, conflicts, guards in order, names.

Same snapshot, same decision, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from cluster.actions import Action, ChangeRole, Decision, Dropped, ScaleRole
from cluster.snapshot import ClusterSnapshot
from policies.expansion import Expansion
from policies.policy import Guard, Policy, Verdict


class Pipeline(msgspec.Struct, frozen=True, kw_only=True):
    """A set of policies and guards. Emergency policies go first, otherwise the order is as given."""

    policies: tuple[Policy, ...]
    guards: tuple[Guard, ...]
    expansion: Expansion = Expansion()

    def decide(self, snapshot: ClusterSnapshot) -> Decision:
        """A policy or guard that raises makes the whole pass do nothing, and says so."""
        accepted: list[Action] = []
        dropped: list[Dropped] = []
        stage: object = None
        try:
            for stage in sorted(self.policies, key=lambda policy: not policy.emergency):
                _accept(stage.decide(snapshot, tuple(accepted)), name_of(stage), accepted, dropped)
            for stage in self.guards:
                accepted, stopped = _limited(stage.limit(snapshot, tuple(accepted)), name_of(stage))
                dropped += stopped
            stage = self.expansion
            actions, unplaced = self.expansion.expand(snapshot, accepted)
        except Exception as error:
            return Decision(failed=f"{name_of(stage)}: {error!r}", targets={group.name: group.wanted for group in snapshot.groups})
        return Decision(
            wishes=tuple(accepted), targets=_targets(snapshot, accepted), actions=actions, dropped=(*dropped, *unplaced)
        )


def name_of(stage: object) -> str:
    return type(stage).__name__


def _accept(proposed: Iterable[Action], by: str, accepted: list[Action], dropped: list[Dropped]) -> None:
    """Add what claims nothing that is claimed; a bundle is added whole or not at all."""
    claimed = {claim: action for action in accepted for claim in action.claims}
    for bundle in _bundles(proposed):
        rivals = _rivals(bundle, claimed)
        if not rivals:
            accepted += bundle
            claimed.update({claim: action for action in bundle for claim in action.claims})
            continue
        claim, rival = min(rivals.items())
        dropped += [Dropped(action=action, by=by, why=f"{name_of(rival)} has claimed {claim} before") for action in bundle]


def _rivals(bundle: Iterable[Action], claimed: Mapping[str, Action]) -> dict[str, Action]:
    """Who has claimed before what the bundle claims: others, or one of its own."""
    own: dict[str, Action] = {}
    found: dict[str, Action] = {}
    for action in bundle:
        for claim in action.claims:
            rival = claimed.get(claim) or own.get(claim)
            if rival is not None:
                found[claim] = rival
            own[claim] = action
    return found


def _bundles(actions: Iterable[Action]) -> list[list[Action]]:
    """What stands and falls together, in the order of each bundle's first action."""
    found: dict[object, list[Action]] = {}
    for index, action in enumerate(actions):
        found.setdefault(action.bundle or index, []).append(action)
    return list(found.values())


def _limited(verdict: Verdict, by: str) -> tuple[list[Action], list[Dropped]]:
    """What a guard let pass, without the bundles of which it stopped or weakened an action."""
    broken = {one.action.bundle for one in verdict.dropped} - {""}
    kept = [action for action in verdict.actions if action.bundle not in broken]
    followers = [action for action in verdict.actions if action.bundle in broken]
    told = [Dropped(action=action, by=by, why=f"bundle {action.bundle} has lost another action") for action in followers]
    return kept, [*verdict.dropped, *told]


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
