"""What callers ask of engines, each a compiled function of the whole fleet's state. `simulator.engines` gives them to Python."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from simulator.steps.batch import adopt, blocks_wanted, has_room, interrupt, next_step, place, settle, withdraw
from simulator.steps.blocks import forget, place_entry
from simulator.steps.calendar import unschedule
from simulator.steps.handle import opened
from simulator.steps.queues import enter
from simulator.steps.records import (
    ELSEWHERE,
    ENTRIES_FREE,
    FREE,
    HEAP,
    IDLE_W,
    NOBODY,
    NOW,
    PREFILLED,
    RESERVED,
    SAID_COUNT,
    SAID_HASHES,
    WAITING,
    Fleet,
)
from simulator.steps.times import step_j, step_s, steps_to

Handle = NDArray[np.int64]

RUNNING, WAITS, WAITING_TOKENS, KV_TOKENS, BLOCKS_USED, LATEST_STEP_S, DECODE_STEP_S, POWER_W, LOADS = range(9)
"""Columns of `loads`. DECODE_STEP_S: of one decode step of the present batch, as it truly is."""


@njit(cache=True)
def advance(handle: Handle, until_s: float, react_s: float) -> bool:
    """Let all engines compute up to a time, or to `react_s` after the first thing was said, or up to a prompt that is done for
    another engine. False where it stopped before `until_s`, as it also does where what was said fills its arrays."""
    fleet = opened(handle)
    limit_s = until_s
    enough, enough_hashes = len(fleet.said) // 2, len(fleet.said_hashes) // 2
    while fleet.counts[HEAP] > 0:
        engine, said = fleet.heap[0], fleet.counts[SAID_COUNT]
        ends_s = fleet.engines[engine].ends_s
        if ends_s > limit_s:
            break
        if said > enough or fleet.counts[SAID_HASHES] > enough_hashes:
            return False
        fleet.clock[NOW] = ends_s
        next_step(fleet, engine)
        for index in range(said, fleet.counts[SAID_COUNT]):
            limit_s = min(limit_s, ends_s if fleet.said[index].kind == PREFILLED else ends_s + react_s)
    return limit_s >= until_s


@njit(cache=True)
def submit(handle: Handle, request: int, engine: int, at_s: float, now_s: float) -> None:
    """Queue a request, which gets there at `at_s`, not before now."""
    fleet = opened(handle)
    fleet.clock[NOW] = now_s
    e, r = fleet.engines[engine], fleet.requests[request]
    r.engine, r.queued_s, r.order, r.computed, r.preempted, r.told = engine, at_s, e.order, 0, 0, 0
    e.order += 1
    e.latest_s = max(e.latest_s, at_s)
    enter(fleet, engine, request, WAITING)
    interrupt(fleet, engine, at_s)


@njit(cache=True)
def reserve(handle: Handle, request: int, engine: int, now_s: float) -> bool:
    """Blocks for a request whose KV will come. False: there is no room now."""
    fleet = opened(handle)
    fleet.clock[NOW] = now_s
    settle(fleet, engine)
    e, r = fleet.engines[engine], fleet.requests[request]
    if not has_room(fleet, engine) or not place(fleet, engine, request, r.prompt):
        return False
    r.engine, r.order, r.state, r.preempted, r.told = engine, e.order, RESERVED, 0, 0
    e.order += 1
    e.reserved += 1
    return True


@njit(cache=True)
def take_over(handle: Handle, request: int, now_s: float) -> bool:
    """All KV of a reserved request is here, as is its first token. False: blocks ran out, and it has to be withdrawn."""
    fleet = opened(handle)
    fleet.clock[NOW] = now_s
    return adopt(fleet, fleet.requests[request].engine, request)


@njit(cache=True)
def take_out(handle: Handle, request: int, now_s: float) -> None:
    """Out of its engine, wherever it is in it. Harmless where it is in none."""
    fleet = opened(handle)
    fleet.clock[NOW] = now_s
    if fleet.requests[request].state not in (FREE, ELSEWHERE):
        withdraw(fleet, fleet.requests[request].engine, request)


@njit(cache=True)
def slow(handle: Handle, engine: int, slowness: float, now_s: float) -> None:
    """Steps last so many times as long from the next one on."""
    fleet = opened(handle)
    fleet.clock[NOW] = now_s
    settle(fleet, engine)
    fleet.engines[engine].slowness = slowness


@njit(cache=True)
def stop(handle: Handle, engine: int, now_s: float) -> None:
    """It computes no more, and its cache is lost. Nobody may be in it."""
    fleet = opened(handle)
    unschedule(fleet, engine)
    fleet.engines[engine].ends_s = np.inf
    fleet.engines[engine].span_steps = 0
    forget(fleet, engine)


@njit(cache=True)
def catch_up(handle: Handle, engine: int, now_s: float) -> None:
    """Take all whole steps before now into the books."""
    fleet = opened(handle)
    fleet.clock[NOW] = now_s
    settle(fleet, engine)


@njit(cache=True)
def loads(handle: Handle, engines: NDArray[np.int32], now_s: float, out: NDArray[np.float64]) -> None:
    """What each would say of itself now. out: [engines, LOADS]."""
    fleet = opened(handle)
    for index in range(len(engines)):
        engine, row = engines[index], out[index]
        e = fleet.engines[engine]
        done = _steps_done(fleet, engine, now_s)
        row[RUNNING] = e.batch + e.joining
        row[WAITS] = e.waiting + e.prefilling + e.reserved  # Who waits for its KV waits as well.
        row[WAITING_TOKENS] = e.waiting_tokens
        row[KV_TOKENS] = e.context_tokens + done * e.batch + e.joining_tokens
        row[BLOCKS_USED] = e.used + (blocks_wanted(fleet, engine, done + 1) if done > 0 else 0)
        row[LATEST_STEP_S] = e.step_s
        row[DECODE_STEP_S] = e.slowness * step_s(fleet, e.times, 0, 0, int(row[RUNNING]), int(row[KV_TOKENS]))
        row[POWER_W] = fleet.scalars[e.times, IDLE_W]
        if e.span_steps > 0 and e.ends_s > e.began_s:
            lasting_s = e.ends_s - e.began_s
            joules = step_j(fleet, e.times, e.chunk_tokens, e.chunk_pairs, e.decodes, lasting_s, e.span_steps)
            row[POWER_W] = joules / lasting_s


@njit(cache=True)
def _steps_done(fleet: Fleet, engine: int, now_s: float) -> int:
    """Whole steps of the span under way that are over."""
    e = fleet.engines[engine]
    if e.span_steps <= 1 or now_s <= e.began_s:
        return 0
    return steps_to(fleet, e.times, e.batch, e.context_tokens, e.span_steps, (now_s - e.began_s) / e.slowness) - 1


@njit(cache=True)
def rehash(handle: Handle, first_new: int) -> None:
    """After growth: every entry that is used finds its place in the new table; those from `first_new` on are free."""
    fleet = opened(handle)
    fleet.table[:] = NOBODY
    free = fleet.counts[ENTRIES_FREE]
    while free != NOBODY:
        fleet.entries[free].engine = NOBODY
        free = fleet.entries[free].older
    for entry in range(first_new):
        if fleet.entries[entry].engine != NOBODY:
            place_entry(fleet, entry)
    for entry in range(len(fleet.entries) - 1, first_new - 1, -1):
        fleet.entries[entry].engine = NOBODY
        fleet.entries[entry].older = fleet.counts[ENTRIES_FREE]
        fleet.counts[ENTRIES_FREE] = entry


@njit(cache=True)
def compact(handle: Handle, order: NDArray[np.int64]) -> int:
    """Move the hashes of the requests in `order`, which lie in that order, together; returns where they end."""
    fleet = opened(handle)
    end = 0
    for request in order:
        at, count = fleet.requests[request].hashes_at, fleet.requests[request].hashes
        for index in range(count):
            fleet.arena[end + index] = fleet.arena[at + index]
            fleet.held[end + index] = fleet.held[at + index]
        fleet.requests[request].hashes_at = end
        end += count
    return end


@njit(cache=True)
def open_request(
    handle: Handle,
    request: int,
    arrival_s: float,
    prompt: int,
    output: int,
    priority: int,
    slo_class: int,
    task: int,
    counted: bool,
) -> None:
    """Write a fresh row."""
    fleet = opened(handle)
    r = fleet.requests[request]
    r.arrival_s, r.queued_s, r.started_s, r.first_s, r.last_s = arrival_s, -1.0, -1.0, -1.0, -1.0
    r.prompt, r.output, r.generated, r.computed, r.cached = prompt, output, 0, 0, -1
    r.priority, r.order, r.engine, r.slot, r.state, r.task = priority, 0, NOBODY, NOBODY, ELSEWHERE, task
    r.preempted, r.preemptions, r.before, r.after, r.blocks, r.shared = 0, 0, NOBODY, NOBODY, 0, 0
    r.hashes_at, r.hashes, r.public, r.told, r.slo_class, r.counted = 0, 0, 0, 0, slo_class, counted


@njit(cache=True)
def begin(
    handle: Handle,
    request: int,
    arrival_s: float,
    prompt: int,
    output: int,
    priority: int,
    slo_class: int,
    counted: bool,
    engine: int,
    at_s: float,
    now_s: float,
) -> None:
    """`open_request` and `submit` in one call, for what shares no blocks."""
    open_request(handle, request, arrival_s, prompt, output, priority, slo_class, 0, counted)
    submit(handle, request, engine, at_s, now_s)
