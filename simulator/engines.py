"""The insides of all replicas, as one object: rows of engines and requests, and the compiled functions that move them on.

Knows no gateway, role or node. Rows are given out and taken back; arrays grow by doubling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.performance import PerformanceModel
from cluster.slo import Slo
from cluster.step_table import StepTable
from simulator.sketch import BUCKETS
from simulator.steps import engines as compiled
from simulator.steps import records
from simulator.steps.handle import handle_of
from simulator.steps.records import ELSEWHERE, FREE, NOBODY, Fleet

MAX_STEPS = 2**31 - 1
SAID, SAID_HASHES = 2**14, 2**20
FIRST_ENTRIES, FIRST_ARENA, FIRST_REQUESTS, FIRST_ENGINES = 2**12, 2**14, 2**10, 2**4
KNOTS = 128
"""Of one function of a performance model, at most."""


class Said(NamedTuple):
    """One thing that an engine said."""

    time_s: float
    kind: int
    engine: int
    request: int
    hashes: tuple[int, ...] = ()


class Work(NamedTuple):
    """What an engine has done since its start."""

    busy_s: float
    energy_j: float
    """Of its steps; while idle it draws on."""
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    steps: int


class Engines:
    """All engines of a simulation."""

    def __init__(
        self,
        slos: Sequence[Slo] = (Slo(),),
        *,
        counted_from_s: float = 0.0,
        reply_s: float = 0.0,
        telling: bool = False,
        stepwise: bool = False,
    ) -> None:
        """slos: by class. counted_from_s: requests that arrive earlier, and gaps before it, are not in the results.
        reply_s: from an engine to a client. telling: say which blocks are shared and evicted. stepwise: take every step by itself,
        the slow reference that spans are held against."""
        counts = np.zeros(records.COUNTS, np.int64)
        counts[records.LONGEST_SPAN] = 1 if stepwise else MAX_STEPS
        counts[records.TELLING] = telling
        counts[records.ENTRIES_FREE] = NOBODY
        bounds = [(slo.ttft_s, slo.tpot_s, slo.e2e_s) for slo in slos]
        self.state = Fleet(
            engines=np.zeros(0, records.ENGINE),
            requests=np.zeros(0, records.REQUEST),
            batch_request=np.zeros((0, 1), np.int32),
            batch_ends=np.zeros((0, 1), np.int64),
            batch_context=np.zeros((0, 1), np.int64),
            batch_room=np.zeros((0, 1), np.int64),
            batch_share=np.zeros((0, 1), np.int64),
            chunk_request=np.zeros((0, 1), np.int32),
            chunk_count=np.zeros((0, 1), np.int32),
            heap=np.zeros(0, np.int32),
            entries=np.zeros(0, records.ENTRY),
            table=np.full(2, NOBODY, np.int32),
            arena=np.zeros(FIRST_ARENA, np.uint64),
            held=np.full(FIRST_ARENA, NOBODY, np.int32),
            said=np.zeros(SAID, records.SAID),
            said_hashes=np.zeros(SAID_HASHES, np.uint64),
            scalars=np.zeros((0, records.SCALARS)),
            knots=np.zeros((0, records.FUNCTIONS, KNOTS, 3)),
            knot_counts=np.zeros((0, records.FUNCTIONS), np.int32),
            counts=counts,
            clock=np.array([0.0, counted_from_s, reply_s]),
            sketches=np.zeros((len(slos), records.SKETCHES, BUCKETS), np.int64),
            slos=np.array([[math.inf if bound is None else bound for bound in each] for each in bounds]),
            tallies=np.zeros((len(slos), records.TALLIES), np.int64),
        )
        self._counted_from_s = counted_from_s
        self._free_engines: list[int] = []
        self._free_requests: list[int] = []
        self._arena_end = 0
        self._hashes = 0
        """Of requests in flight."""

    @property
    def state(self) -> Fleet:
        """All arrays, as they now are."""
        return self._state

    @state.setter
    def state(self, state: Fleet) -> None:
        self._state, self._handle = state, handle_of(state)
        self._states, self._hash_counts = state.requests["state"], state.requests["hashes"]
        self.cached_tokens = state.requests["cached"]

    # ── models and engines ──

    def model(self, performance: PerformanceModel | StepTable) -> int:
        """A row for step times that replicas may have."""
        scalars = np.zeros(records.SCALARS)
        scalars[records.STEP_S] = performance.step_s
        scalars[records.PAIR_S] = performance.prefill_pair_s
        scalars[records.IDLE_W] = performance.idle_w
        scalars[records.PREFILL_W] = performance.prefill_w
        if isinstance(performance, StepTable):
            scalars[records.MIXED_FACTOR] = performance.mixed_factor or 0.0
            return self._add_model(scalars, (performance.prefill, performance.decode, performance.kv, performance.decode_w))
        growth_w = performance.prefill_w
        functions = (
            ((0.0, 0.0), (1.0, performance.prefill_token_s)),
            ((0.0, 0.0), (1.0, performance.sequence_s)),
            ((0.0, 0.0), (1.0, performance.kv_token_s)),
            ((0.0, growth_w), (1.0, growth_w)),
        )
        scalars[records.STEP_J] = performance.step_s * (performance.decode_w - growth_w)
        return self._add_model(scalars, functions)

    def _add_model(self, scalars: NDArray[np.float64], functions: Sequence[Sequence[tuple[float, float]]]) -> int:
        state, row = self.state, len(self.state.scalars)
        knots, counts = np.zeros((1, records.FUNCTIONS, KNOTS, 3)), np.zeros((1, records.FUNCTIONS), np.int32)
        for function, points in enumerate(functions):
            where, there = np.array(points, dtype=np.float64).T
            slopes = np.diff(there) / np.diff(where)
            counts[0, function] = len(points)
            knots[0, function, : len(points)] = np.column_stack((where, there, [*slopes, slopes[-1]]))
        self.state = state._replace(
            scalars=np.vstack((state.scalars, scalars)),
            knots=np.concatenate((state.knots, knots)),
            knot_counts=np.concatenate((state.knot_counts, counts)),
        )
        return row

    def add(
        self,
        *,
        model: int,
        kv_blocks: int,
        block_tokens: int,
        max_running: int,
        step_budget_tokens: int,
        batching: int = records.CHUNKED,
        slowness: float = 1.0,
    ) -> int:
        """A new engine, empty and idle; its row."""
        places = min(max_running, step_budget_tokens)  # With more decodes than budget a prompt would never get its turn.
        self._widen(places)
        if not self._free_engines:
            self._more_engines()
        row = self._free_engines.pop()
        engine = self.state.engines[row : row + 1]
        engine[:] = 0
        for name in ("first_waiting", "last_waiting", "first_prefilling", "last_prefilling", "first_joining", "oldest", "newest"):
            engine[name] = NOBODY
        engine["place"] = NOBODY
        engine["ends_s"] = math.inf
        engine["latest_s"] = -math.inf
        engine["budget"], engine["places"], engine["batching"] = step_budget_tokens, places, batching
        engine["kv_blocks"], engine["block_tokens"] = kv_blocks, block_tokens
        engine["times"], engine["slowness"] = model, slowness
        return row

    def remove(self, row: int, now_s: float) -> list[int]:
        """The engine is gone, its blocks with it. Returns who was in it, each with what it had generated by then."""
        compiled.catch_up(self._handle, row, now_s)
        requests = self.state.requests
        inside = np.flatnonzero((requests["engine"] == row) & ~np.isin(requests["state"], (FREE, ELSEWHERE)))
        inside = inside[np.argsort(requests["order"][inside], kind="stable")].tolist()
        for request in inside:
            compiled.take_out(self._handle, request, now_s)
        compiled.stop(self._handle, row, now_s)
        self._free_engines.append(row)
        return inside

    # ── requests ──

    def request(
        self,
        *,
        arrival_s: float,
        prompt: int,
        output: int,
        hashes: Sequence[int] | NDArray[np.uint64] = (),
        public: int | None = None,
        priority: int = 0,
        slo_class: int = 0,
        task: int = records.WHOLE,
    ) -> int:
        """A new request, in no engine yet; its row. `output` >= 1 tokens in all. public: so many of the hashes at the front are of
        blocks that others can ask for, all of them unless given: of those engines tell."""
        if not self._free_requests:
            self._more_requests()
        row = self._free_requests.pop()
        counted = arrival_s >= self._counted_from_s and task == records.WHOLE
        compiled.open_request(self._handle, row, arrival_s, prompt, output, priority, slo_class, task, counted)
        if len(hashes):
            self._keep(row, hashes)
            self._state.requests["public"][row] = len(hashes) if public is None else public
        return row

    def free(self, request: int) -> None:
        """Its row may be given away."""
        self._hashes -= int(self._hash_counts[request])
        self._states[request] = FREE
        self._free_requests.append(request)

    def begin(
        self, engine: int, at_s: float, now_s: float, *, arrival_s: float, prompt: int, output: int, priority: int, slo_class: int
    ) -> int:
        """A new request that shares no blocks, queued at an engine: `request` and `submit` in one."""
        if not self._free_requests:
            self._more_requests()
        row, counted = self._free_requests.pop(), arrival_s >= self._counted_from_s
        compiled.begin(
            self._handle, row, arrival_s, prompt, output, priority, slo_class, counted, engine, at_s, now_s
        )  # fmt: skip
        return row

    def submit(self, request: int, engine: int, at_s: float, now_s: float) -> None:
        compiled.submit(self._handle, request, engine, at_s, now_s)

    def reserve(self, request: int, engine: int, now_s: float) -> bool:
        return compiled.reserve(self._handle, request, engine, now_s)

    def take_over(self, request: int, now_s: float) -> bool:
        return compiled.take_over(self._handle, request, now_s)

    def take_out(self, request: int, now_s: float) -> None:
        compiled.take_out(self._handle, request, now_s)

    def slow(self, engine: int, slowness: float, now_s: float) -> None:
        compiled.slow(self._handle, engine, slowness, now_s)

    # ── time ──

    def advance(self, until_s: float, react_s: float = math.inf) -> bool:
        """See `simulator.steps.engines.advance`."""
        if self._hashes:
            used = int(self._state.counts[records.ENTRIES_USED])
            while len(self._state.entries) - used < self._hashes:
                self._more_entries()
        return compiled.advance(self._handle, until_s, react_s)

    def take_said(self) -> list[Said]:
        """All that was said since the last call, in order."""
        state = self._state
        count = int(state.counts[records.SAID_COUNT])
        if not count:
            return []
        all_hashes = state.said_hashes
        found = [
            Said(time_s, kind, engine, request, tuple(all_hashes[at : at + hashes].tolist()) if hashes else ())
            for time_s, kind, engine, request, hashes, at in state.said[:count].tolist()
        ]
        state.counts[records.SAID_COUNT] = state.counts[records.SAID_HASHES] = 0
        return found

    def loads(self, engines: NDArray[np.int32], now_s: float) -> NDArray[np.float64]:
        """[engines, LOADS]: see `simulator.steps.engines.loads`."""
        out = np.zeros((len(engines), compiled.LOADS))
        compiled.loads(self._handle, engines, now_s, out)
        return out

    def work(self, engine: int, now_s: float) -> Work:
        """Of all whole steps until now."""
        compiled.catch_up(self._handle, engine, now_s)
        row = self.state.engines[engine]
        counts = ("prompt_tokens", "cached_tokens", "output_tokens", "preemptions", "all_steps")
        return Work(float(row["busy_s"]), float(row["energy_j"]), *(int(row[name]) for name in counts))

    # ── growth ──

    def _keep(self, row: int, hashes: Sequence[int] | NDArray[np.uint64]) -> None:
        count = len(hashes)
        self._hashes += count
        if self._arena_end + count > len(self.state.arena):
            self._tidy_arena(count)
        state, at = self.state, self._arena_end
        state.arena[at : at + count] = hashes
        state.held[at : at + count] = NOBODY
        state.requests["hashes_at"][row], state.requests["hashes"][row] = at, count
        self._arena_end = at + count

    def _tidy_arena(self, more: int) -> None:
        """Close the gaps; grow where less than half would be free."""
        state = self.state
        live = np.flatnonzero((state.requests["state"] != FREE) & (state.requests["hashes"] > 0))
        order = live[np.argsort(state.requests["hashes_at"][live], kind="stable")]
        self._arena_end = int(compiled.compact(self._handle, order))
        size = len(state.arena)
        while self._arena_end + more > size // 2:
            size *= 2
        if size > len(state.arena):
            self.state = state._replace(
                arena=_grown(state.arena, size, np.uint64(0)), held=_grown(state.held, size, np.int32(NOBODY))
            )

    def _more_entries(self) -> None:
        state, before = self.state, len(self.state.entries)
        size = max(FIRST_ENTRIES, 2 * before)
        self.state = state._replace(
            entries=_grown(state.entries, size, np.zeros((), records.ENTRY)), table=np.full(2 * size, NOBODY, np.int32)
        )
        compiled.rehash(self._handle, before)

    def _more_requests(self) -> None:
        state, before = self.state, len(self.state.requests)
        size = max(FIRST_REQUESTS, 2 * before)
        self.state = state._replace(requests=_grown(state.requests, size, np.zeros((), records.REQUEST)))
        self._free_requests += range(size - 1, before - 1, -1)

    def _more_engines(self) -> None:
        state, before = self.state, len(self.state.engines)
        size = max(FIRST_ENGINES, 2 * before)
        grown = {name: _grown(getattr(state, name), size, 0) for name in _PER_ENGINE}
        engines = _grown(state.engines, size, np.zeros((), records.ENGINE))
        engines["place"][before:] = NOBODY
        self.state = state._replace(engines=engines, **grown)
        self._free_engines += range(size - 1, before - 1, -1)

    def _widen(self, places: int) -> None:
        """Room for so many sequences in every batch."""
        if self.state.batch_request.shape[1] < places:
            wide = {name: _widened(getattr(self.state, name), places) for name in _PER_ENGINE if name != "heap"}
            self.state = self.state._replace(**wide)


_PER_ENGINE = ("batch_request", "batch_ends", "batch_context", "batch_room", "batch_share", "chunk_request", "chunk_count", "heap")


def _grown(array: NDArray, size: int, fill: object) -> NDArray:
    grown = np.empty((size, *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    grown[len(array) :] = fill
    return grown


def _widened(array: NDArray, width: int) -> NDArray:
    wide = np.zeros((array.shape[0], width), array.dtype)
    wide[:, : array.shape[1]] = array
    return wide


def warm() -> None:
    """Compile, or load what was compiled: about a minute the first time on a machine."""
    engines = Engines()
    model = engines.model(PerformanceModel(step_s=1e-3, prefill_token_s=1e-5))
    row = engines.add(model=model, kv_blocks=16, block_tokens=16, max_running=4, step_budget_tokens=64)
    request = engines.request(arrival_s=0.0, prompt=16, output=4, hashes=[1])
    engines.reserve(request, row, 0.0)
    engines.take_over(request, 0.0)
    other = engines.begin(row, 0.0, 0.0, arrival_s=0.0, prompt=4, output=2, priority=0, slo_class=0)
    engines.advance(0.0)
    engines.loads(np.array([row], np.int32), 0.0)
    engines.slow(row, 2.0, 0.0)
    engines.take_out(other, 0.0)
    engines.submit(other, row, 0.0, 0.0)
    engines.work(row, 0.0)
    engines.remove(row, 0.0)
    for _ in range(FIRST_ARENA // 64 + 1):
        engines.free(engines.request(arrival_s=0.0, prompt=1024, output=1, hashes=range(64)))
