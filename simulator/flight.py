"""One request of a simulation, from its arrival to its last token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.record import TraceRow
from policies.route import Ask, Route
from simulator.links import Flow

if TYPE_CHECKING:
    from simulator.gateway import SimulatedGateway
    from simulator.host import Host

NO_ROW = -1


class Flight:
    """Where it is, and what a gateway remembers of it."""

    __slots__ = (
        "arrival_s",
        "ask",
        "attempt",
        "cached",
        "excluded",
        "first_s",
        "flow",
        "gateway",
        "generated",
        "hashes",
        "host",
        "queued_s",
        "request_id",
        "route",
        "row",
        "sent_generated",
        "sent_s",
        "slo_class",
        "source",
        "source_row",
        "trace",
        "tried",
        "vain",
    )

    def __init__(self, request_id: str, trace: TraceRow, hashes: tuple[int, ...], slo_class: int, now_s: float) -> None:
        """slo_class: its number. hashes: of the prompt's blocks, at the replicas' block size."""
        self.request_id, self.trace, self.hashes, self.slo_class = request_id, trace, hashes, slo_class
        self.arrival_s = self.queued_s = now_s
        self.gateway: SimulatedGateway | None = None
        self.ask: Ask | None = None
        self.route: Route | None = None
        self.attempt = -1
        self.row = NO_ROW
        """Among the engines' requests; NO_ROW before it was sent."""
        self.host: Host | None = None
        """Which decodes it; None while it waits at a gateway."""
        self.source: Host | None = None
        """Which computes its prompt for that one."""
        self.source_row = NO_ROW
        self.flow: Flow | None = None
        self.generated = 0
        """Tokens the client had when the latest attempt ended."""
        self.sent_generated = 0
        self.sent_s: float | None = None
        self.first_s: float | None = None
        self.cached = 0
        self.tried: list[str] = []
        self.vain = 0
        self.excluded: frozenset[str] = frozenset()

    @property
    def output(self) -> int:
        """Tokens in all. Traces have answers of none, which cost a first token all the same."""
        return max(1, self.trace.output_tokens)
