"""What a controller does first: learn what the one before knew and had begun, and who runs already.

Nothing new is decided before that: what lives has registered, what does not is given up once, and every order that may not have
been given is given again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable

import msgspec

from cluster.fleet import Fleet
from cluster.placement import group_name, group_of
from cluster.replica import Phase
from cluster.snapshot import ReplicaState
from controller.act.actuator import Actuator
from controller.act.orders import Orders
from controller.controller import recall
from controller.journal import Entry, Journal
from controller.memory import GroupMemory, Memory
from controller.observe.watch import SILENCE_S, Watch
from controller.registry import Registry

log = logging.getLogger(__name__)

SETTLE_S = SILENCE_S  # A worker that lives has registered with a new controller by then, or others have kept it busy.
MAX_SETTLE_S = 60.0  # Ten thousand calls take some ten seconds.
UNSETTLED_S = 1800.0  # Orders that are older are not given again: the longest start is half of it.


class TakingOver:
    """Of one fleet, by a controller that has begun to listen to its workers."""

    def __init__(
        self,
        fleet: Fleet,
        journal: Journal,
        registry: Registry,
        watch: Watch,
        actuator: Actuator,
        orders: Orders,
        clock: Callable[[], float],
    ) -> None:
        self._fleet, self._journal, self._registry, self._watch = fleet, journal, registry, watch
        self._actuator, self._orders, self._clock = actuator, orders, clock

    async def memory(self, last: Entry | None) -> Memory:
        """To go on with. last: pass of the controller before, None where the journal has none."""
        if last is not None:
            return await self._from_journal(last)
        if not self._watch.running:
            return Memory()
        log.warning("%d workers run, and no journal says why: they are kept as they are", len(self._watch.running))
        await self._settled({"those that are not known by name"})
        return self._as_found()

    async def _from_journal(self, last: Entry) -> Memory:
        memory = recall(self._journal)
        self._watch.remember_lost(one for one in last.snapshot.replicas if one.phase is Phase.LOST)
        expected = {one.replica_id: one for one in last.snapshot.replicas if _registered(one)}
        await self._settled(expected.keys())
        self._give_up(state for name, state in expected.items() if name not in self._registry.table.replicas)
        self._actuator.carry_out(self._orders.resume(self._journal.unsettled(self._clock() - UNSETTLED_S)))
        return self._numbered(memory)

    async def _settled(self, expected: Iterable[str]) -> None:
        """Until all of them have registered, or had the time to: nobody came for SETTLE_S."""
        waiting = frozenset(expected)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MAX_SETTLE_S):
                while waiting - self._registry.table.replicas.keys():
                    await asyncio.wait_for(self._registry.changed(), SETTLE_S)

    def _give_up(self, states: Iterable[ReplicaState]) -> None:
        """They ended while nobody watched, or hang."""
        now_s = round(self._clock(), 3)
        lost = [msgspec.structs.replace(state, phase=Phase.LOST, phase_since_s=now_s, load=None) for state in states]
        self._watch.remember_lost(lost)
        for state in lost:
            self._actuator.end(state.replica_id, state.node)

    def _as_found(self) -> Memory:
        """Nobody remembers what was wanted: what runs, then."""
        pools = {node.name: node.pool for node in self._fleet.nodes}
        found = {group_of(self._fleet, spec): 0 for spec in self._fleet.replicas}
        for row in self._registry.table.replicas.values():
            name = group_name(row.model, row.role, pools.get(row.node, ""))
            found[name] = found.get(name, 0) + 1
        return self._numbered(Memory(groups={name: GroupMemory(wanted=count) for name, count in found.items()}))

    def _numbered(self, memory: Memory) -> Memory:
        """No number of a replica that runs is given again, whether the journal knows of it or not."""
        numbers = [
            int(number) for number in (name.rpartition("-")[2] for name in self._registry.table.replicas) if number.isdigit()
        ]
        return msgspec.structs.replace(memory, next_replica=max(memory.next_replica, *(number + 1 for number in numbers), 0))


def _registered(state: ReplicaState) -> bool:
    """Whether it had told what it is. Just after a take-over those that have may not have sent a report yet."""
    told = state.load is not None or state.ready_since_s is not None
    return state.phase in (Phase.WARMING, Phase.READY) or (told and state.phase is not Phase.LOST)
