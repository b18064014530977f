"""Each engine's lists of requests: who waits, whose prompt is being computed, who joins the batch; the first two in order of rank.

Rank: higher priority first, then who came first to this engine.
"""

from __future__ import annotations

from numba import njit

from simulator.steps.records import JOINING, NOBODY, PREFILLING, WAITING, Fleet


@njit(cache=True)
def goes_before(fleet: Fleet, one: int, other: int) -> bool:
    if fleet.requests[one].priority != fleet.requests[other].priority:
        return fleet.requests[one].priority > fleet.requests[other].priority
    return fleet.requests[one].order < fleet.requests[other].order


@njit(cache=True)
def left(fleet: Fleet, request: int) -> int:
    """Tokens, prompt and output, whose KV is still to compute."""
    return fleet.requests[request].prompt + fleet.requests[request].generated - fleet.requests[request].computed


@njit(cache=True)
def enter(fleet: Fleet, engine: int, request: int, state: int) -> None:
    """Into the list that goes with the state."""
    e, r = fleet.engines[engine], fleet.requests[request]
    r.state = state
    if state == JOINING:
        r.after, r.before = e.first_joining, NOBODY
        if r.after != NOBODY:
            fleet.requests[r.after].before = request
        e.first_joining = request
        e.joining += 1
        e.joining_tokens += r.prompt + r.generated
        return
    e.waiting_tokens += left(fleet, request)
    last = e.last_waiting if state == WAITING else e.last_prefilling
    while last != NOBODY and goes_before(fleet, request, last):
        last = fleet.requests[last].before
    r.before = last
    if last == NOBODY:
        r.after = e.first_waiting if state == WAITING else e.first_prefilling
    else:
        r.after = fleet.requests[last].after
        fleet.requests[last].after = request
    if r.after != NOBODY:
        fleet.requests[r.after].before = request
    if state == WAITING:
        e.waiting += 1
        e.first_waiting = request if last == NOBODY else e.first_waiting
        e.last_waiting = request if r.after == NOBODY else e.last_waiting
    else:
        e.prefilling += 1
        e.first_prefilling = request if last == NOBODY else e.first_prefilling
        e.last_prefilling = request if r.after == NOBODY else e.last_prefilling


@njit(cache=True)
def leave(fleet: Fleet, engine: int, request: int) -> None:
    """Out of its list."""
    e, r = fleet.engines[engine], fleet.requests[request]
    if r.before != NOBODY:
        fleet.requests[r.before].after = r.after
    if r.after != NOBODY:
        fleet.requests[r.after].before = r.before
    if r.state == WAITING:
        e.waiting -= 1
        e.first_waiting = r.after if r.before == NOBODY else e.first_waiting
        e.last_waiting = r.before if r.after == NOBODY else e.last_waiting
    elif r.state == PREFILLING:
        e.prefilling -= 1
        e.first_prefilling = r.after if r.before == NOBODY else e.first_prefilling
        e.last_prefilling = r.before if r.after == NOBODY else e.last_prefilling
    else:
        e.joining -= 1
        e.joining_tokens -= r.prompt + r.generated
        e.first_joining = r.after if r.before == NOBODY else e.first_joining
        return
    e.waiting_tokens -= left(fleet, request)
