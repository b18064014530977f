"""What a gateway knows of its fleet: reports merged with the work it sent since.

`FleetView` is fed with membership, load reports, block events and its own charges, each with the time it happened; it answers with
a `RoutingView` of one model. All times are Unix seconds of one clock: the gateway's, or the simulator's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.kv import KvEvent
from cluster.replica import Load, Replica
from policies.prefix_index import PrefixIndex

if TYPE_CHECKING:
    from policies.policy import Ask, Route

TRANSIT_S = 0.02  # A report made this soon after a charge may not know of it: the way to the worker, and unequal clocks.

(
    READY,
    PREFILLS,
    DECODES,
    HEARD_S,
    READY_SINCE_S,
    RANK,
    IDENTITY,
    HOST,
    CONTEXT_TOKENS,
    MAX_RUNNING,
    STEP_BUDGET,
    KV_BLOCKS,
    BLOCK_TOKENS,
    LAYERS,
    KV_TOKEN_BYTES,
    LAYOUT,
    STEP_S,
    PREFILL_TOKEN_S,
    PREFILL_PAIR_S,
    SEQUENCE_S,
    KV_TOKEN_S,
    SEQUENCES,
    WAITING_TOKENS,
    KV_TOKENS,
    BLOCKS_USED,
    COLUMNS,
) = range(26)
"""Columns of `RoutingView.rows`. From SEQUENCES on they move with load; the rest are facts of the membership table.

READY, PREFILLS (for others) and DECODES are 0 or 1. RANK orders replicas by id. HOST and LAYOUT are equal where hosts and
layouts are; LAYOUT 0 is none, HOST 0 shares memory with nobody. SEQUENCES: requests running or waiting. KV_TOKENS: context of
those, when their prompts will be done. HEARD_S is -inf for a suspect.
"""


class RoutingView(msgspec.Struct, frozen=True, kw_only=True):
    """One model's replicas at one moment. Valid until its FleetView is next fed: the arrays are shared with it."""

    model: str
    now_s: float
    replicas: Sequence[Replica | None]
    """By row; None where a row is free."""
    rows: NDArray[np.float64]
    """[rows, COLUMNS]; a free row is all 0."""
    row_of: dict[str, int]
    """Row by replica id."""
    index: PrefixIndex
    """Who holds which block; its replicas are numbered by row."""
    oldest_prefill_s: float
    """When the first of the READY replicas that prefill for others became so; inf without one."""
    oldest_decode_s: float
    """The same of those that decode."""


class FleetView:
    """The state machine. Unknown replicas, requests and attempts are ignored: news of them may come late."""

    def __init__(self, *, transit_s: float = TRANSIT_S) -> None: ...

    def membership(self, replicas: Sequence[Replica], now_s: float) -> None:
        """The whole table as it now is. Who is not in it is forgotten, with its blocks and charges."""

    def report(self, load: Load, now_s: float) -> None:
        """A replica's word on itself; takes over what was charged before it was made. Older sequences are dropped."""

    def kv_events(self, replica_id: str, sequence: int, events: Sequence[KvEvent]) -> bool:
        """Block events in order. False once for each gap: send a Resync; until its KvCleared comes, events are ignored."""

    def charge(self, ask: Ask, attempt: int, route: Route, now_s: float) -> None:
        """Count a request at once where it was sent, until reports know of it."""

    def first_token(self, request_id: str, attempt: int, now_s: float) -> None:
        """Its prompt is done: the prefill replica is free of it."""

    def settle(self, request_id: str, attempt: int, now_s: float) -> None:
        """It ended, whatever the way."""

    def suspect(self, replica_id: str, now_s: float) -> None:
        """Do not route there until it reports again."""

    def suspect_worker(self, worker_id: str, now_s: float) -> None:
        """A stream broke or is silent: suspect all of the worker's replicas."""

    def replica(self, replica_id: str) -> Replica | None:
        """Its row of the membership table; None where it is not in it."""

    def load(self, replica_id: str) -> Load | None:
        """Its latest report; None before the first."""

    def routing_view(self, model: str, now_s: float) -> RoutingView:
        """The model's view; without rows where nobody serves it."""
