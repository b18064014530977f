"""Each engine's KV blocks: held ones, shareable prefixes, and those kept until room is wanted, least recently used first.

The bookkeeping of `workers.engines.block_pool`, for all engines at once. A block is an *entry* only once others can find it; all
others are mere numbers.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from simulator.steps.records import (
    ENTRIES_FREE,
    ENTRIES_USED,
    NOBODY,
    NOW,
    REMOVED,
    SAID_COUNT,
    SAID_HASHES,
    STORED,
    TELLING,
    UNSHARED,
    Fleet,
)


@njit(cache=True)
def available(fleet: Fleet, engine: int) -> int:
    """Blocks that can be taken: what nobody holds, cached ones among it."""
    return fleet.engines[engine].kv_blocks - fleet.engines[engine].used


@njit(cache=True)
def matched(fleet: Fleet, engine: int, request: int, most: int) -> int:
    """Full blocks at the front of its prompt, at most `most`, that the engine has."""
    at, count = fleet.requests[request].hashes_at, min(most, fleet.requests[request].hashes)
    found = 0
    while found < count and _find(fleet, engine, fleet.arena[at + found]) != NOBODY:
        found += 1
    return found


@njit(cache=True)
def unheld(fleet: Fleet, engine: int, request: int, found: int) -> int:
    """How many of the first `found` blocks nobody holds yet."""
    at, free = fleet.requests[request].hashes_at, 0
    for index in range(found):
        free += fleet.entries[_find(fleet, engine, fleet.arena[at + index])].holders == 0
    return free


@njit(cache=True)
def hold(fleet: Fleet, engine: int, request: int, found: int, more: int) -> None:
    """Take the first `found` blocks that are there, and so many new ones: they must be available."""
    at = fleet.requests[request].hashes_at
    for index in range(found):
        entry = _find(fleet, engine, fleet.arena[at + index])
        if fleet.entries[entry].holders == 0:
            _unlink(fleet, engine, entry)
            fleet.engines[engine].used += 1
        fleet.entries[entry].holders += 1
        fleet.held[at + index] = entry
    for index in range(found, fleet.requests[request].hashes):
        fleet.held[at + index] = NOBODY
    fleet.requests[request].blocks = found
    fleet.requests[request].shared = found
    take(fleet, engine, request, more)


@njit(cache=True)
def take(fleet: Fleet, engine: int, request: int, count: int) -> None:
    """So many new blocks, which must be available; cached ones go where free ones run out."""
    fleet.engines[engine].used += count
    fleet.requests[request].blocks += count
    short = fleet.engines[engine].used + fleet.engines[engine].cached - fleet.engines[engine].kv_blocks
    for _ in range(short):
        _evict(fleet, engine)


@njit(cache=True)
def release(fleet: Fleet, engine: int, request: int) -> None:
    """Give all back. The last goes first, so that eviction shortens prefixes from their end."""
    at, own = fleet.requests[request].hashes_at, fleet.requests[request].blocks
    for index in range(min(fleet.requests[request].shared, fleet.requests[request].hashes) - 1, -1, -1):
        entry = fleet.held[at + index]
        if entry == NOBODY:
            continue
        own -= 1
        fleet.held[at + index] = NOBODY
        fleet.entries[entry].holders -= 1
        if fleet.entries[entry].holders == 0:
            fleet.engines[engine].used -= 1
            _link(fleet, engine, entry)
    fleet.engines[engine].used -= own
    fleet.requests[request].blocks = 0
    fleet.requests[request].shared = 0


@njit(cache=True)
def share(fleet: Fleet, engine: int, request: int, full: int) -> None:
    """Let others find its first `full` blocks. A prefix that another block holds stays with that block."""
    at, first = fleet.requests[request].hashes_at, fleet.requests[request].shared
    full = min(full, fleet.requests[request].hashes)
    told = 0
    for index in range(first, full):
        if _find(fleet, engine, fleet.arena[at + index]) != NOBODY:
            fleet.held[at + index] = NOBODY
            continue
        entry = _enter(fleet, engine, fleet.arena[at + index])
        fleet.held[at + index] = entry
        if entry == NOBODY:
            fleet.counts[UNSHARED] += 1
        elif fleet.counts[TELLING] and index < fleet.requests[request].public:
            fleet.entries[entry].public = 1
            fleet.said_hashes[fleet.counts[SAID_HASHES] + told] = fleet.arena[at + index]
            told += 1
    fleet.requests[request].shared = max(first, full)
    if told:
        _tell(fleet, STORED, engine, request, told)


@njit(cache=True)
def forget(fleet: Fleet, engine: int) -> None:
    """Drop all that is cached, untold: the engine is gone. Nobody may hold blocks any more."""
    while fleet.engines[engine].cached > 0:
        entry = fleet.engines[engine].oldest
        _unlink(fleet, engine, entry)
        _leave(fleet, entry)


@njit(cache=True)
def _evict(fleet: Fleet, engine: int) -> None:
    entry = fleet.engines[engine].oldest
    _unlink(fleet, engine, entry)
    if fleet.entries[entry].public:
        fleet.said_hashes[fleet.counts[SAID_HASHES]] = fleet.entries[entry].hash
        _tell(fleet, REMOVED, engine, NOBODY, 1)
    _leave(fleet, entry)


@njit(cache=True)
def _tell(fleet: Fleet, kind: int, engine: int, request: int, count: int) -> None:
    """Of hashes that lie in `said_hashes` already. Blocks removed in a row are told of as one."""
    index, at = fleet.counts[SAID_COUNT], fleet.counts[SAID_HASHES]
    fleet.counts[SAID_HASHES] += count
    if index > 0 and kind == REMOVED:
        last = fleet.said[index - 1]
        if last.kind == REMOVED and last.engine == engine and last.time_s == fleet.clock[NOW]:
            last.count += count
            return
    fleet.said[index].time_s = fleet.clock[NOW]
    fleet.said[index].kind = kind
    fleet.said[index].engine = engine
    fleet.said[index].request = request
    fleet.said[index].count = count
    fleet.said[index].at = at
    fleet.counts[SAID_COUNT] += 1


# The list of cached blocks.


@njit(cache=True)
def _link(fleet: Fleet, engine: int, entry: int) -> None:
    newest = fleet.engines[engine].newest
    fleet.entries[entry].older = newest
    fleet.entries[entry].newer = NOBODY
    if newest == NOBODY:
        fleet.engines[engine].oldest = entry
    else:
        fleet.entries[newest].newer = entry
    fleet.engines[engine].newest = entry
    fleet.engines[engine].cached += 1


@njit(cache=True)
def _unlink(fleet: Fleet, engine: int, entry: int) -> None:
    older, newer = fleet.entries[entry].older, fleet.entries[entry].newer
    if older == NOBODY:
        fleet.engines[engine].oldest = newer
    else:
        fleet.entries[older].newer = newer
    if newer == NOBODY:
        fleet.engines[engine].newest = older
    else:
        fleet.entries[newer].older = older
    fleet.engines[engine].cached -= 1


# The table of entries: open addressing, linear probing, deletion by shifting back (Knuth, TAOCP 3, 6.4, algorithm R).


@njit(cache=True)
def _home(fleet: Fleet, engine: int, digest: int) -> int:
    mixed = np.uint64(digest) ^ (np.uint64(engine + 1) * np.uint64(0x9E3779B97F4A7C15))
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return np.int64((mixed ^ (mixed >> np.uint64(32))) & np.uint64(len(fleet.table) - 1))


@njit(cache=True)
def _find(fleet: Fleet, engine: int, digest: int) -> int:
    place, last = _home(fleet, engine, digest), len(fleet.table) - 1
    while True:
        entry = fleet.table[place]
        if entry == NOBODY or (fleet.entries[entry].hash == digest and fleet.entries[entry].engine == engine):
            return entry
        place = (place + 1) & last


@njit(cache=True)
def _enter(fleet: Fleet, engine: int, digest: int) -> int:
    """A new entry with one holder; NOBODY where there is no room for one."""
    entry = fleet.counts[ENTRIES_FREE]
    if entry == NOBODY:
        return NOBODY
    fleet.counts[ENTRIES_FREE] = fleet.entries[entry].older
    fleet.counts[ENTRIES_USED] += 1
    fleet.entries[entry].hash = digest
    fleet.entries[entry].engine = engine
    fleet.entries[entry].holders = 1
    fleet.entries[entry].public = 0
    place_entry(fleet, entry)
    return entry


@njit(cache=True)
def place_entry(fleet: Fleet, entry: int) -> None:
    """Into the table."""
    place, last = _home(fleet, fleet.entries[entry].engine, fleet.entries[entry].hash), len(fleet.table) - 1
    while fleet.table[place] != NOBODY:
        place = (place + 1) & last
    fleet.table[place] = entry


@njit(cache=True)
def _leave(fleet: Fleet, entry: int) -> None:
    last = len(fleet.table) - 1
    hole = _home(fleet, fleet.entries[entry].engine, fleet.entries[entry].hash)
    while fleet.table[hole] != entry:
        hole = (hole + 1) & last
    place = hole
    while True:
        place = (place + 1) & last
        other = fleet.table[place]
        if other == NOBODY:
            break
        home = _home(fleet, fleet.entries[other].engine, fleet.entries[other].hash)
        if ((place - home) & last) >= ((place - hole) & last):
            fleet.table[hole] = other
            hole = place
    fleet.table[hole] = NOBODY
    fleet.entries[entry].older = fleet.counts[ENTRIES_FREE]
    fleet.counts[ENTRIES_FREE] = entry
    fleet.counts[ENTRIES_USED] -= 1
