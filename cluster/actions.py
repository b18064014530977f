"""What may be done to a cluster: one class per action, each absolute, so that doing it twice is harmless."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cluster.replica import Role


class Reason(msgspec.Struct, frozen=True, kw_only=True):
    """Why, in words and numbers."""

    text: str
    numbers: Mapping[str, float] = {}
    runner_up: str = ""
    """The next best thing, and why not that."""
    levers: tuple[str, ...] = ()
    """Inputs that could have turned the decision, as `policies.levers` names them."""


class _Action(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    reason: Reason
    bundle: str = ""
    """Actions of one bundle need each other: if one is dropped, all are. Empty stands alone."""


class ScaleRole(_Action, frozen=True, kw_only=True):
    """Have so many replicas of a group. The pipeline turns it into named starts and drains."""

    group: str
    replicas: int

    @property
    def words(self) -> str:
        return f"{self.group} to {self.replicas}"

    @property
    def claims(self) -> tuple[str, ...]:
        return (self.group,)


class StartReplica(_Action, frozen=True, kw_only=True):
    """Have this replica run on this node."""

    replica_id: str
    group: str
    node: str

    @property
    def words(self) -> str:
        return f"start {self.replica_id} on {self.node}"

    @property
    def claims(self) -> tuple[str, ...]:
        return (self.replica_id,)


class DrainReplica(_Action, frozen=True, kw_only=True):
    """Take nothing new, finish what there is, end: at the deadline at the latest, and the gateways resume the rest elsewhere."""

    replica_id: str
    deadline_s: float
    """Unix time."""

    @property
    def words(self) -> str:
        return f"drain {self.replica_id}"

    @property
    def claims(self) -> tuple[str, ...]:
        return (self.replica_id,)


class ChangeRole(_Action, frozen=True, kw_only=True):
    """Have this replica in another role, its weights kept."""

    replica_id: str
    role: Role
    source: str
    """The group it leaves."""
    target: str
    """The group it joins."""

    @property
    def words(self) -> str:
        return f"{self.replica_id} becomes {self.role.value}"

    @property
    def claims(self) -> tuple[str, ...]:
        return (self.source, self.target, self.replica_id)


Action = ScaleRole | StartReplica | DrainReplica | ChangeRole


class Dropped(msgspec.Struct, frozen=True, kw_only=True):
    """An action that was proposed and is not carried out, or not as proposed."""

    action: Action
    by: str
    """The policy or guard that stood in its way."""
    why: str


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one pass."""

    wishes: tuple[Action, ...] = ()
    """What policies proposed and guards let pass, before it was turned into names."""
    targets: Mapping[str, int] = {}
    """Replicas wanted, by group."""
    actions: tuple[Action, ...] = ()
    """To carry out, in order."""
    dropped: tuple[Dropped, ...] = ()
    failed: str = ""
    """Why nothing was decided: the policy that raised, and what; empty otherwise."""
