"""What operators have said: pins and drained nodes go before every other wish."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cluster.actions import Action, DrainReplica, Reason, ScaleRole
from cluster.ranges import at_least
from cluster.snapshot import ClusterSnapshot


class Hands(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The policy. Emergency, since a person is at the controls."""

    drain_s: float = 60.0
    """A replica on a drained node may finish its streams for so long."""
    emergency: bool = True

    def __post_init__(self) -> None:
        at_least(0.0, drain_s=self.drain_s)

    def decide(self, snapshot: ClusterSnapshot, accepted: Sequence[Action]) -> Sequence[Action]:
        pins = {hold.target: hold for hold in snapshot.holds if hold.kind == "pin"}
        drained = {hold.target: hold.author for hold in snapshot.holds if hold.kind == "drain"}
        actions: list[Action] = []
        for group in snapshot.groups:
            if (pin := pins.get(group.name)) is not None and pin.replicas is not None:
                reason = Reason(text=f"pinned by {pin.author}", numbers={"expires_s": pin.expires_s})
                actions.append(ScaleRole(group=group.name, replicas=pin.replicas, reason=reason, ordered=True))
        for replica in snapshot.replicas:
            if replica.present and (author := drained.get(replica.node)):
                reason = Reason(text=f"node {replica.node} is drained by {author}")
                deadline_s = snapshot.now_s + self.drain_s
                actions.append(DrainReplica(replica_id=replica.replica_id, deadline_s=deadline_s, reason=reason, ordered=True))
        return actions
