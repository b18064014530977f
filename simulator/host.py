"""One replica of a simulated fleet: its row in the membership table, its engine, and what has become of it."""

from __future__ import annotations

import msgspec

from cluster.fleet import ReplicaGroup
from cluster.replica import Load, Phase, Replica, Role
from simulator.engines import Work
from simulator.flight import Flight


class Host:
    """`row` is what the fleet is told of it; `engine` what it does."""

    def __init__(self, row: Replica, spec: ReplicaGroup, engine: int, since_s: float) -> None:
        self.row, self.spec, self.engine = row, spec, engine
        self.since_s = since_s
        """When it entered its phase."""
        self.flights: dict[Flight, None] = {}
        """Which it decodes, or will."""
        self.sources: dict[Flight, None] = {}
        """Whose prompts it computes for others."""
        self.reports = 0
        self.load: Load | None = None
        self.heard_s = since_s
        self.alive = True
        """False once its process has ended or hangs, whether that is known yet or not."""
        self.missed = False
        """Whether gateways have noticed that."""
        self.next_role: Role | None = None
        """Of a change under way."""
        self.born_s = since_s
        """In the simulation: those of its beginning at 0."""
        self.gone_s: float | None = None
        self.idle_w = 0.0
        self.slowness = 1.0
        self.work: Work | None = None
        """What its engine had done when it ended."""

    @property
    def replica_id(self) -> str:
        return self.row.replica_id

    @property
    def busy(self) -> bool:
        return bool(self.flights or self.sources)

    def enter(self, phase: Phase, now_s: float) -> None:
        ready_s = now_s if phase is Phase.READY else self.row.ready_since_s
        self.row = msgspec.structs.replace(self.row, phase=phase, ready_since_s=ready_s)
        self.since_s = now_s
