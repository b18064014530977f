"""One pass's look at everything: who was lost, what is known of the rest, and the snapshot made of it."""

from __future__ import annotations

from collections.abc import Callable

from cluster.fleet import Fleet
from cluster.snapshot import ClusterSnapshot
from controller.act.orders import Orders
from controller.memory import Memory
from controller.observe.assemble import Seen, assemble
from controller.observe.counters import Telemetry
from controller.observe.machines import Machines
from controller.observe.watch import Loss, Watch
from controller.registry import Registry


class Observer:
    """Implements `controller.controller.Observer`."""

    def __init__(
        self,
        fleet: Fleet,
        registry: Registry,
        watch: Watch,
        machines: Machines,
        orders: Orders,
        *,
        telemetry: Callable[[], Telemetry],
        bury: Callable[[Loss], None],
        clock: Callable[[], float],
        ahead: Callable[[], float],
    ) -> None:
        """bury: told of each worker that is given up. ahead: seconds by which the clock on the wall is ahead of `clock`."""
        self.fleet = fleet
        self._registry, self._watch, self._machines, self._orders = registry, watch, machines, orders
        self._telemetry, self._bury, self._clock, self._ahead = telemetry, bury, clock, ahead

    async def observe(self, memory: Memory) -> ClusterSnapshot:
        now_s = self._clock()
        for loss in self._watch.sweep():
            self._bury(loss)
        seen = Seen(
            replicas=self._registry.table.membership.replicas,
            started=self._watch.started,
            lost=self._watch.lost_states(),
            heard=self._watch.heard_loads,
            since_s=self._watch.since_s,
            alive=self._machines.alive(),
            draining=self._orders.draining,
            changing=self._orders.changing,
        )
        return assemble(self.fleet, seen, self._telemetry(), memory, now_s, self._ahead())
