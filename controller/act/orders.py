"""What was ordered, and what became of it, as the snapshots that follow show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from cluster.actions import Action, ChangeRole, DrainReplica, ScaleRole, StartReplica
from cluster.replica import Phase, Role
from cluster.snapshot import ClusterSnapshot, FailedStart, ReplicaState
from controller.journal import Outcome
from controller.memory import Memory, with_failed_starts, with_start

NODE_GRACE_S = 5.0  # A start on a node that is down for so long is given up: it may have been a moment's suspicion.
CRASH_S = 60.0  # A replica that is lost so soon after READY counts as a start that failed.
OVERDUE_S = 10.0  # Beyond its deadline a draining replica is ended by force.
CHANGE_S = 600.0  # A change of role that takes longer has failed: a drain and a warm-up are a minute or two.


class Order(msgspec.Struct, kw_only=True):
    """One action that is under way."""

    number: int
    """Of the pass."""
    index: int
    """Among the decision's actions."""
    action: StartReplica | DrainReplica | ChangeRole
    at_s: float
    failure: str = ""
    """Why it cannot be, as far as is known."""
    begun: bool = False
    """Its worker has heard it."""
    unlisted: int = 0
    """Lists of Ray's processes in a row that lack its own."""
    node_down_s: float | None = None
    """Since when the node of a start is down."""


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """What a pass has found out."""

    outcomes: tuple[Outcome, ...] = ()
    memory: Memory
    overdue: tuple[str, ...] = ()
    """Replicas to end by force."""


class Orders:
    """Those that are not settled, by replica."""

    def __init__(self, start_timeout_s: Mapping[str, float]) -> None:
        """start_timeout_s: by group."""
        self.start_timeout_s = start_timeout_s
        self.open: dict[str, Order] = {}
        self._superseded: list[Outcome] = []

    def begin(self, number: int, actions: Iterable[Action], now_s: float) -> list[Order]:
        """Those that are not under way already: absolute actions may be decided twice before they show."""
        begun = []
        for index, action in enumerate(actions):
            if isinstance(action, ScaleRole):
                continue
            known = self.open.get(action.replica_id)
            if known is not None and type(known.action) is not type(action):
                self._superseded.append(Outcome(number=known.number, action=known.index, at_s=now_s, outcome="superseded"))
            if known is None or type(known.action) is not type(action):
                order = self.open[action.replica_id] = Order(number=number, index=index, action=action, at_s=now_s)
                begun.append(order)
        return begun

    def resume(self, unsettled: Iterable[tuple[int, int, float, Action]]) -> list[Order]:
        """What an earlier controller began and may not have given: pass, index, time and action, oldest first.

        A later order for a replica stands for all before it, but that one that drains need not be started any more.
        """
        for number, index, at_s, action in unsettled:
            if not isinstance(action, ScaleRole):
                self.open[action.replica_id] = Order(number=number, index=index, action=action, at_s=at_s)
        return list(self.open.values())

    def fail(self, replica_id: str, why: str) -> None:
        """Whoever was to carry it out says that it cannot be."""
        order = self.open.get(replica_id)
        if order is not None:
            order.failure = order.failure or why

    @property
    def draining(self) -> frozenset[str]:
        return frozenset(name for name, order in self.open.items() if isinstance(order.action, DrainReplica))

    @property
    def changing(self) -> Mapping[str, Role]:
        """Roles to come."""
        return {name: order.action.role for name, order in self.open.items() if isinstance(order.action, ChangeRole)}

    def settle(self, snapshot: ClusterSnapshot, memory: Memory) -> Settled:
        """Compare with what is seen. Memory learns from starts, good and bad."""
        states = {state.replica_id: state for state in snapshot.replicas}
        memory = with_failed_starts(memory, _crashes(snapshot))
        outcomes, self._superseded = self._superseded, []
        overdue: list[str] = []
        for name, order in list(self.open.items()):
            told = self._told(order, states.get(name), snapshot)
            if told is None:
                if isinstance(order.action, DrainReplica) and snapshot.now_s > order.action.deadline_s + OVERDUE_S:
                    order.failure = "did not end by its deadline, and was ended by force"
                    overdue.append(name)
                continue
            outcome, took_s = told
            outcomes.append(Outcome(number=order.number, action=order.index, at_s=snapshot.now_s, outcome=outcome))
            del self.open[name]
            if isinstance(order.action, StartReplica) and took_s is not None:
                memory = with_start(memory, order.action.group, took_s)
            elif isinstance(order.action, ChangeRole) and name in states and states[name].phase is Phase.WARMING:
                overdue.append(name)
            elif isinstance(order.action, StartReplica):
                failure = FailedStart(group=order.action.group, node=order.action.node, at_s=snapshot.now_s)
                memory = with_failed_starts(memory, [failure])
                overdue.append(name)
        return Settled(outcomes=tuple(outcomes), memory=memory, overdue=tuple(overdue))

    def _told(self, order: Order, state: ReplicaState | None, snapshot: ClusterSnapshot) -> tuple[str, float | None] | None:
        """The outcome and the seconds that a start took; None while it is under way."""
        match order.action:
            case StartReplica():
                return self._started(order, order.action, state, snapshot)
            case DrainReplica():
                if state is None or state.phase in (Phase.STOPPED, Phase.LOST):
                    return order.failure or f"gone after {snapshot.now_s - order.at_s:.1f} s", None
                return (order.failure, None) if order.failure else None
            case ChangeRole():
                return _changed(order, order.action, state, snapshot.now_s)

    def _started(
        self, order: Order, action: StartReplica, state: ReplicaState | None, snapshot: ClusterSnapshot
    ) -> tuple[str, float | None] | None:
        age_s = snapshot.now_s - order.at_s
        if state is not None and state.phase in (Phase.READY, Phase.DRAINING):
            took_s = max(0.0, state.phase_since_s - order.at_s)
            return f"ready after {took_s:.1f} s", took_s
        if order.failure:
            return f"failed: {order.failure}", None
        if state is not None and state.phase is Phase.LOST:
            return "died while it started", None
        node = snapshot.node_by_name.get(action.node)
        order.node_down_s = None if node is not None and node.alive else order.node_down_s or snapshot.now_s
        if order.node_down_s is not None and snapshot.now_s - order.node_down_s > NODE_GRACE_S:
            return f"failed: node {action.node} is down", None
        bound_s = self.start_timeout_s[action.group]
        return (f"failed: not ready within {bound_s:.0f} s", None) if age_s > bound_s else None


def _changed(order: Order, action: ChangeRole, state: ReplicaState | None, now_s: float) -> tuple[str, float | None] | None:
    if state is None or state.phase in (Phase.STOPPED, Phase.LOST):
        return "lost on the way", None
    if order.failure:
        return f"failed: {order.failure}", None
    if state.role is action.role and state.phase is Phase.READY:
        return f"{action.role.value} after {state.phase_since_s - order.at_s:.1f} s", None
    return ("failed: the role did not change", None) if now_s - order.at_s > CHANGE_S else None


def _crashes(snapshot: ClusterSnapshot) -> list[FailedStart]:
    """A replica that is lost soon after it was READY is a start that failed."""
    return [
        FailedStart(group=state.group, node=state.node, at_s=state.phase_since_s)
        for state in snapshot.replicas
        if state.phase is Phase.LOST and state.ready_since_s is not None and state.phase_since_s - state.ready_since_s < CRASH_S
    ]
