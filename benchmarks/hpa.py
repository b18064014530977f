"""A queue-length rule with the defaults of Kubernetes' horizontal autoscaler, as a policy that a config can name."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from cluster.actions import Action, Reason, ScaleRole
from cluster.snapshot import ClusterSnapshot, Group, Workload


class QueueLength(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """As many replicas as the requests in flight are multiples of `target`; for models with one group, for runs of five minutes.

    It goes down to the highest wish of the last five minutes, the count it began with among them: in a shorter run, never. In its
    favour it reads requests in flight of the last second, where a cluster's metrics are 15 to 60 s old. Source: kubernetes.io,
    "Horizontal Pod Autoscaling", and the API's HPAScalingRules.
    """

    target: float = 2.0
    """Requests accepted and not ended, for each replica."""
    period_s: int = 15
    tolerance: float = 0.1
    """So far off the target nothing is done."""
    up_replicas: int = 4
    up_share: float = 1.0
    """Up by so many, or by this share, within a period: by whichever is more."""
    emergency: bool = False

    def decide(self, snapshot: ClusterSnapshot, accepted: Sequence[Action]) -> Sequence[Action]:
        return [self._scale(snapshot, group, snapshot.workload_by_model[group.model]) for group in snapshot.groups]

    def _scale(self, snapshot: ClusterSnapshot, group: Group, workload: Workload) -> ScaleRole:
        current, due = group.wanted, snapshot.pass_number % self.period_s == 0  # One pass a second.
        off = workload.in_flight / (current * self.target) - 1.0
        wish = math.ceil(workload.in_flight / self.target) if due and off > self.tolerance else current
        most = max(current + self.up_replicas, math.ceil(current * (1.0 + self.up_share)))
        wanted = min(max(wish, current), most, group.max_replicas)
        return ScaleRole(group=group.name, replicas=wanted, reason=Reason(text=f"{workload.in_flight} in flight"))
