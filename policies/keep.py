"""Have what is wanted, and want nothing else: what brings a fleet up, and what others can be compared to."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cluster.actions import Action, Reason, ScaleRole
from cluster.snapshot import ClusterSnapshot


class Keep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The policy."""

    emergency: bool = False

    def decide(self, snapshot: ClusterSnapshot, accepted: Sequence[Action]) -> Sequence[Action]:
        reason = Reason(text="as many as are wanted")
        return [ScaleRole(group=group.name, replicas=group.wanted, reason=reason) for group in snapshot.groups]
