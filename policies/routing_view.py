"""What a gateway knows of its fleet: reports merged with the work it sent since.

`FleetView` is fed with membership, load reports, block events and its own charges, each with the time it happened; it answers with
a `RoutingView` of one model. All times are Unix seconds of one clock: the gateway's, or the simulator's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from cluster.kv import KvCleared, KvEvent, KvLayout, blocks_for
from cluster.performance import PerformanceModel
from cluster.replica import Load, Phase, Replica
from policies.cells import (
    BLOCK_TOKENS,
    COLUMNS,
    CONTEXT_TOKENS,
    DECODES,
    HEARD_S,
    HOST,
    IDENTITY,
    KV_BLOCKS,
    KV_TOKEN_BYTES,
    KV_TOKEN_S,
    LAYERS,
    LAYOUT,
    MAX_RUNNING,
    PREFILL_PAIR_S,
    PREFILL_TOKEN_S,
    PREFILLS,
    RANK,
    READY,
    READY_SINCE_S,
    SEQUENCE_S,
    STEP_BUDGET,
    STEP_S,
    add_load,
    set_load,
)
from policies.prefix_index import PrefixIndex
from policies.route import Ask, Route

TRANSIT_S = 0.02  # A report made this soon after a charge may not know of it: the way to the worker, and unequal clocks.

UNPACED = PerformanceModel(step_s=2e-3, prefill_token_s=1e-4, sequence_s=2e-4, kv_token_s=1e-7)
"""Stands for a replica that states no times, so that loads still compare: about a model of 5M parameters on one CPU core."""


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

    def __init__(self, *, transit_s: float = TRANSIT_S) -> None:
        self._transit_s = transit_s
        self._models: dict[str, _Model] = {}
        self._members: dict[str, _Member] = {}
        self._charges: dict[tuple[str, int], _Charge] = {}

    @property
    def in_flight(self) -> int:
        """Charges not settled."""
        return len(self._charges)

    def membership(self, replicas: Sequence[Replica], now_s: float) -> None:
        """The whole table as it now is. Who is not in it is forgotten, with its blocks and charges."""
        listed = {replica.replica_id: replica for replica in replicas}
        for replica_id, member in list(self._members.items()):
            if replica_id not in listed or listed[replica_id].model != member.replica.model:
                self._forget(member)
        for replica_id, replica in listed.items():
            known = self._members.get(replica_id)
            if known is None:
                model = self._models.setdefault(replica.model, _Model(replica.model))
                self._members[replica_id] = model.add(replica, now_s)
            elif known.replica != replica:
                known.replica = replica
                known.model.describe(known)
        for model in self._models.values():
            model.rank()

    def report(self, load: Load, now_s: float) -> None:
        """A replica's word on itself; takes over what was charged before it was made. Older sequences are dropped."""
        member = self._members.get(load.replica_id)
        if member is None or (member.load is not None and load.sequence <= member.load.sequence):
            return
        phase_changed = load.phase is not (member.load.phase if member.load else member.replica.phase)
        member.load = load
        member.heard_s = now_s
        if member.fresh:
            member.fresh = {share: True for share in member.fresh if share.sent_s + self._transit_s > load.at_s}
        set_load(
            member.model.rows,
            member.row,
            now_s,
            load.running + load.waiting,
            load.waiting_tokens,
            load.kv_tokens + load.waiting_tokens,
            load.kv_blocks_used,
        )
        for share in member.fresh:
            add_load(member.model.rows, member.row, *share.amounts)
        if phase_changed:
            member.model.set_ready(member)
            member.model.find_oldest()

    def kv_events(self, replica_id: str, sequence: int, events: Sequence[KvEvent]) -> bool:
        """Block events in order. False once for each gap: send a Resync; until its KvCleared comes, events are ignored."""
        member = self._members.get(replica_id)
        if member is None:
            return True
        cleared = any(isinstance(event, KvCleared) for event in events)
        if not cleared and sequence != member.next_events:
            gap = member.next_events is None or sequence > member.next_events
            asked, member.resync_asked = member.resync_asked, member.resync_asked or gap
            if gap:
                member.next_events = None
            return asked or not gap
        member.next_events, member.resync_asked = sequence + 1, False
        for event in events:
            member.model.index.apply(member.row, event)
        return True

    def charge(self, ask: Ask, attempt: int, route: Route, now_s: float) -> None:
        """Count a request at once where it was sent, until reports know of it."""
        decode = self._members.get(route.decode.replica_id)
        prefill = self._members.get(route.prefill.replica_id) if route.prefill else None
        if decode is None:
            return
        self.settle(ask.request_id, attempt, now_s)
        size, context, uncached = decode.replica.block_tokens, ask.prompt_tokens, route.uncached_tokens
        whole = (1.0, 0.0, float(context), float(blocks_for(context + ask.expected_output_tokens, size)))
        if prefill is None:
            prompt = _Share(decode, now_s, (0.0, float(uncached), 0.0, 0.0))
        else:
            prompt = _Share(prefill, now_s, (1.0, float(uncached), float(uncached), float(blocks_for(context, size))))
        charge = _Charge(decode=_Share(decode, now_s, whole), prefill=prompt)
        charge.decode.add()
        prompt.add()
        self._charges[ask.request_id, attempt] = charge

    def first_token(self, request_id: str, attempt: int, now_s: float) -> None:
        """Its prompt is done: the prefill replica is free of it."""
        charge = self._charges.get((request_id, attempt))
        if charge is not None and charge.prefill is not None:
            charge.prefill.undo(reported=False)
            charge.prefill = None

    def settle(self, request_id: str, attempt: int, now_s: float) -> None:
        """It ended, whatever the way."""
        charge = self._charges.pop((request_id, attempt), None)
        if charge is None:
            return
        if charge.prefill is not None:
            charge.prefill.undo(reported=False)
        charge.decode.undo(reported=True)

    def suspect(self, replica_id: str, now_s: float) -> None:
        """Do not route there until it reports again."""
        member = self._members.get(replica_id)
        if member is not None:
            member.heard_s = -math.inf
            member.model.rows[member.row, HEARD_S] = -math.inf

    def suspect_worker(self, worker_id: str, now_s: float) -> None:
        """A stream broke or is silent: suspect all of the worker's replicas."""
        for member in self._members.values():
            if member.replica.worker_id == worker_id:
                self.suspect(member.replica.replica_id, now_s)

    def replica(self, replica_id: str) -> Replica | None:
        """Its row of the membership table; None where it is not in it."""
        member = self._members.get(replica_id)
        return None if member is None else member.replica

    def load(self, replica_id: str) -> Load | None:
        """Its latest report; None before the first."""
        member = self._members.get(replica_id)
        return None if member is None else member.load

    def routing_view(self, model: str, now_s: float) -> RoutingView:
        """The model's view; without rows where nobody serves it."""
        return (self._models.get(model) or _Model(model)).view(now_s)

    def _forget(self, member: _Member) -> None:
        del self._members[member.replica.replica_id]
        member.model.remove(member)
        self._charges = {key: charge for key, charge in self._charges.items() if charge.decode.member is not member}
        for charge in self._charges.values():
            if charge.prefill is not None and charge.prefill.member is member:
                charge.prefill = None


class _Member(msgspec.Struct, eq=False, kw_only=True):
    """One replica and what was heard of it."""

    replica: Replica
    model: _Model
    row: int
    heard_s: float
    load: Load | None = None
    fresh: dict[_Share, bool] = {}
    """Charges that no report knows of yet, in the order sent."""
    next_events: int | None = None
    """The block event message expected next; None until a KvCleared."""
    resync_asked: bool = False


class _Share(msgspec.Struct, eq=False):
    """What one request weighs on one replica."""

    member: _Member
    sent_s: float
    amounts: tuple[float, float, float, float]
    """Sequences, waiting tokens, KV tokens and blocks."""

    def add(self) -> None:
        self.member.fresh[self] = True
        add_load(self.member.model.rows, self.member.row, *self.amounts)

    def undo(self, *, reported: bool) -> None:
        """Take it off, also where a report already counted it if `reported`."""
        fresh = self.member.fresh.pop(self, False)
        if fresh or reported:
            sequences, waiting_tokens, kv_tokens, blocks = self.amounts
            add_load(self.member.model.rows, self.member.row, -sequences, -waiting_tokens, -kv_tokens, -blocks)


class _Charge(msgspec.Struct, eq=False, kw_only=True):
    """A request in flight. `prefill` is None once its prompt is done; it weighs on the decode replica where that prefills."""

    decode: _Share
    prefill: _Share | None = None


class _Model:
    """The rows of one model. A replica keeps its row for life; freed rows are taken again, lowest first."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.index = PrefixIndex()
        self.rows = np.zeros((0, COLUMNS))
        self._members: list[_Member | None] = []
        self._replicas: list[Replica | None] = []
        self._row_of: dict[str, int] = {}
        self._oldest_prefill_s = self._oldest_decode_s = math.inf
        self._hosts: dict[str, float] = {"": 0.0}
        self._layouts: dict[KvLayout | None, float] = {None: 0.0}

    def add(self, replica: Replica, now_s: float) -> _Member:
        row = self._members.index(None) if None in self._members else self._grow()
        member = _Member(replica=replica, model=self, row=row, heard_s=now_s)
        self._members[row] = member
        self._row_of[replica.replica_id] = row
        self.rows[row] = 0.0
        self.describe(member)
        return member

    def remove(self, member: _Member) -> None:
        self._members[member.row] = self._replicas[member.row] = None
        del self._row_of[member.replica.replica_id]
        self.rows[member.row] = 0.0
        self.index.forget(member.row)

    def describe(self, member: _Member) -> None:
        """Write the facts of a replica into its row."""
        replica, cells = member.replica, self.rows[member.row]
        performance = replica.performance if replica.performance.step_s else UNPACED
        layout = replica.layout
        self._replicas[member.row] = replica
        cells[PREFILLS] = replica.role.prefills_for_others and layout is not None
        cells[DECODES] = replica.role.decodes
        cells[HEARD_S] = member.heard_s
        cells[READY_SINCE_S] = -math.inf if replica.ready_since_s is None else replica.ready_since_s
        cells[IDENTITY] = xxhash.xxh32_intdigest(replica.replica_id.encode())
        cells[HOST] = self._hosts.setdefault(replica.host_id, float(len(self._hosts)))
        cells[CONTEXT_TOKENS] = replica.context_tokens
        cells[MAX_RUNNING] = replica.max_running
        cells[STEP_BUDGET] = replica.step_budget_tokens
        cells[KV_BLOCKS] = replica.kv_blocks
        cells[BLOCK_TOKENS] = replica.block_tokens
        cells[LAYERS] = layout.layers if layout else 0
        cells[KV_TOKEN_BYTES] = layout.token_bytes if layout else 0
        cells[LAYOUT] = self._layouts.setdefault(layout, float(len(self._layouts)))
        cells[STEP_S] = performance.step_s
        cells[PREFILL_TOKEN_S] = performance.prefill_token_s
        cells[PREFILL_PAIR_S] = performance.prefill_pair_s
        cells[SEQUENCE_S] = performance.sequence_s
        cells[KV_TOKEN_S] = performance.kv_token_s
        self.set_ready(member)

    def set_ready(self, member: _Member) -> None:
        """READY where the table and the replica itself say so: whichever hears of a drain first."""
        phases = (member.replica.phase, member.load.phase if member.load else Phase.READY)
        self.rows[member.row, READY] = all(phase is Phase.READY for phase in phases)

    def rank(self) -> None:
        """Order by id, after members came or went."""
        for rank, replica_id in enumerate(sorted(self._row_of)):
            self.rows[self._row_of[replica_id], RANK] = rank
        self.find_oldest()

    def find_oldest(self) -> None:
        since = self.rows[:, READY_SINCE_S]
        known = (self.rows[:, READY] > 0) & np.isfinite(since)
        self._oldest_prefill_s = float(since[known & (self.rows[:, PREFILLS] > 0)].min(initial=math.inf))
        self._oldest_decode_s = float(since[known & (self.rows[:, DECODES] > 0)].min(initial=math.inf))

    def view(self, now_s: float) -> RoutingView:
        return RoutingView(
            model=self.name,
            now_s=now_s,
            replicas=self._replicas,
            rows=self.rows,
            row_of=self._row_of,
            index=self.index,
            oldest_prefill_s=self._oldest_prefill_s,
            oldest_decode_s=self._oldest_decode_s,
        )

    def _grow(self) -> int:
        self._members.append(None)
        self._replicas.append(None)
        self.rows = np.vstack((self.rows, np.zeros((1, COLUMNS))))
        return len(self._members) - 1
