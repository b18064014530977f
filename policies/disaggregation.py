"""Prefill and decode apart or together, and in which ratio: replicas that change role between two groups of one pool.

A replica changes role when its group spares it with a margin, the other is short, and a change is over before a start would be (or
there is no room for a start). Since the giver keeps what its flow needs with a margin, the same flow cannot ask it back. Whether
to prefill apart at all is asked by size: the arrangement that needs a replica less, its SLO kept, is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec

from cluster.actions import Action, ChangeRole, Reason, ScaleRole
from cluster.ranges import at_least
from cluster.replica import Phase, Role
from cluster.snapshot import ClusterSnapshot, Group, ReplicaState, Workload
from policies import levers
from policies.expansion import removal_order
from policies.flow import Flow, Window, fallen, kept, reaches_back, risen
from policies.sizing import Bounds, decode_fits, measured, prefill_fits, smallest


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """Replicas that one flow needs."""

    prefill: int
    decode: int
    together: int
    """Where decode replicas prefill as well."""


class Disaggregation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The policy. It goes before scaling, whose wishes for the two groups then wait a pass."""

    window: Window = Window()
    bounds: Bounds = Bounds()
    margin: float = 1.1
    """Times the risen flow the giver must still carry: the performance model's error."""
    change_s: float = 5.0
    """From drained to READY in the new role: weights stay, a batch is warmed."""
    emergency: bool = False

    def __post_init__(self) -> None:
        at_least(1.0, margin=self.margin)
        at_least(0.0, change_s=self.change_s)

    def decide(self, snapshot: ClusterSnapshot, accepted: Sequence[Action]) -> Sequence[Action]:
        actions: list[Action] = []
        for prefill, decode in pairs(snapshot):
            workload = snapshot.workload_by_model.get(prefill.model)
            if workload is not None:
                actions += self._arrange(snapshot, workload, prefill, decode) or self._shift(snapshot, workload, prefill, decode)
        return actions

    def _arrange(self, snapshot: ClusterSnapshot, workload: Workload, prefill: Group, decode: Group) -> Sequence[Action]:
        """Switch between apart and together where a replica is saved both by what is and by the worst of late."""
        if prefill.min_replicas > 0 or not reaches_back(workload, self.window):
            return ()
        now = self._need(prefill, decode, risen(workload, self.window), workload)
        worst = self._need(prefill, decode, fallen(workload, self.window), workload)
        apart = prefill.wanted > 0
        saved = [need.prefill + need.decode - need.together for need in (now, worst)]
        if apart and min(saved) >= 1 and worst.together <= decode.max_replicas and kept(workload, self.window):
            text = f"together {worst.together} replicas do what {worst.prefill} + {worst.decode} do apart"
            return _bundle(prefill, 0, decode, max(worst.together, decode.min_replicas), text)
        if not apart and max(saved) <= -1 and now.prefill <= prefill.max_replicas:
            text = f"apart {now.prefill} + {now.decode} replicas do what {now.together} do together"
            return _bundle(prefill, now.prefill, decode, max(now.decode, decode.min_replicas), text)
        return ()

    def _shift(self, snapshot: ClusterSnapshot, workload: Workload, prefill: Group, decode: Group) -> Sequence[Action]:
        """One replica to the group that is short, if the other spares it."""
        if prefill.wanted == 0:
            return ()
        rise = risen(workload, self.window, ahead_s=max(prefill.startup_s, decode.startup_s))
        need, safe = self._need(prefill, decode, rise, workload), self._need(prefill, decode, rise.times(self.margin), workload)
        spare = {
            prefill.name: prefill.wanted - max(safe.prefill, prefill.min_replicas, 1),
            decode.name: decode.wanted - max(safe.decode, decode.min_replicas),
        }
        short = {
            prefill.name: min(need.prefill, prefill.max_replicas) - prefill.wanted,
            decode.name: min(need.decode, decode.max_replicas) - decode.wanted,
        }
        for source, target in ((prefill, decode), (decode, prefill)):
            if spare[source.name] < 1 or short[target.name] < 1:
                continue
            leaving_s, start_s = self._leaving_s(source, workload, rise), target.startup_s
            room = any(free > 0 and snapshot.node_by_name[node].pool == target.pool for node, free in snapshot.free_slots.items())
            if room and leaving_s + self.change_s >= start_s:
                continue
            replica = _first_to_go(snapshot, source)
            if replica is None:
                continue
            numbers = {
                "change_s": leaving_s + self.change_s,
                "start_s": start_s,
                "short": short[target.name],
                "spare": spare[source.name],
            }
            text = f"{target.name} is short of {short[target.name]}, {source.name} spares {spare[source.name]}"
            runner_up = "a start takes longer" if room else "a start, for which the pool has no room"
            turns = (*_levers(workload.model), levers.start_up(target.name))
            reason = Reason(text=text, numbers=numbers, runner_up=runner_up, levers=turns)
            return (
                ChangeRole(replica_id=replica.replica_id, role=target.role, source=source.name, target=target.name, reason=reason),
            )
        return ()

    def _need(self, prefill: Group, decode: Group, flow: Flow, workload: Workload) -> Need:
        slo, bounds = workload.slo, self.bounds
        return Need(
            prefill=max(1, smallest(partial(prefill_fits, prefill, flow, slo, bounds))),
            decode=max(1, smallest(partial(decode_fits, decode, flow, slo, bounds, prefilling=False))),
            together=max(1, smallest(partial(decode_fits, decode, flow, slo, bounds, prefilling=True))),
        )

    def _leaving_s(self, source: Group, workload: Workload, flow: Flow) -> float:
        """Mean time until what a replica of the group has is done: half an answer, or half the queue that TTFT allows."""
        if source.role is Role.PREFILL:
            return (workload.slo.ttft_s or 0.0) / 2
        return flow.output_tokens / 2 * (workload.slo.tpot_s or measured(source).decode_step_s(1, 0))


def pairs(snapshot: ClusterSnapshot) -> list[tuple[Group, Group]]:
    """Prefill and decode groups of one model on one pool and of one build, whose replicas may change places."""
    known = [group for group in snapshot.groups if group.performance is not None]
    decoding = {(group.model, group.pool, group.build): group for group in known if group.role is Role.DECODE}
    prefilling = {(group.model, group.pool, group.build): group for group in known if group.role is Role.PREFILL}
    return [(group, decoding[kind]) for kind, group in prefilling.items() if kind in decoding]


def _first_to_go(snapshot: ClusterSnapshot, group: Group) -> ReplicaState | None:
    ready = [replica for replica in snapshot.replicas_by_group[group.name] if replica.phase is Phase.READY]
    return min(ready, key=lambda replica: removal_order(snapshot, replica), default=None)


def _bundle(prefill: Group, prefills: int, decode: Group, decodes: int, text: str) -> Sequence[Action]:
    reason = Reason(
        text=text,
        numbers={"prefill": prefills, "decode": decodes, "prefill_before": prefill.wanted, "decode_before": decode.wanted},
        runner_up=f"{prefill.wanted} + {decode.wanted}, as it is",
        levers=_levers(prefill.model),
    )
    bundle = f"arrangement of {prefill.model} on {prefill.pool}"
    wishes = ((prefill, prefills), (decode, decodes))
    return [ScaleRole(group=group.name, replicas=count, reason=reason, bundle=bundle) for group, count in wishes]


def _levers(model: str) -> tuple[str, ...]:
    return (levers.demand(model), levers.prompt_length(model), levers.output_length(model))
