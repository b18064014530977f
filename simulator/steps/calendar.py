"""Which engine is next: a binary heap of those that compute, by the time their span ends, then by row."""

from __future__ import annotations

from numba import njit

from simulator.steps.records import HEAP, NOBODY, Fleet


@njit(cache=True)
def _before(fleet: Fleet, one: int, other: int) -> bool:
    first_s, second_s = fleet.engines[one].ends_s, fleet.engines[other].ends_s
    return first_s < second_s or (first_s == second_s and one < other)


@njit(cache=True)
def _put(fleet: Fleet, place: int, engine: int) -> None:
    fleet.heap[place] = engine
    fleet.engines[engine].place = place


@njit(cache=True)
def _rise(fleet: Fleet, place: int) -> None:
    engine = fleet.heap[place]
    while place > 0 and _before(fleet, engine, fleet.heap[(place - 1) // 2]):
        _put(fleet, place, fleet.heap[(place - 1) // 2])
        place = (place - 1) // 2
    _put(fleet, place, engine)


@njit(cache=True)
def _sink(fleet: Fleet, place: int) -> None:
    engine, size = fleet.heap[place], fleet.counts[HEAP]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and _before(fleet, fleet.heap[child + 1], fleet.heap[child]):
            child += 1
        if not _before(fleet, fleet.heap[child], engine):
            break
        _put(fleet, place, fleet.heap[child])
        place = child
    _put(fleet, place, engine)


@njit(cache=True)
def schedule(fleet: Fleet, engine: int) -> None:
    """Its `ends_s` has changed."""
    place = fleet.engines[engine].place
    if place == NOBODY:
        place = fleet.counts[HEAP]
        fleet.counts[HEAP] += 1
        _put(fleet, place, engine)
    _rise(fleet, place)
    _sink(fleet, fleet.engines[engine].place)


@njit(cache=True)
def unschedule(fleet: Fleet, engine: int) -> None:
    """It does not compute any more. Harmless where it did not."""
    place = fleet.engines[engine].place
    if place == NOBODY:
        return
    fleet.engines[engine].place = NOBODY
    fleet.counts[HEAP] -= 1
    last = fleet.heap[fleet.counts[HEAP]]
    if last != engine:
        _put(fleet, place, last)
        _rise(fleet, place)
        _sink(fleet, fleet.engines[last].place)
