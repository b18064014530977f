"""Puts rows that were written as their requests ended back into order of arrival, holding a bounded number of them.

It sorts no trace: a row further from its place than the bounds is an error, as it comes from another log or another run.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterable, Iterator

from msgspec.structs import replace

from cluster.record import TraceRow

REORDER_S = 900.0  # No row comes later than the longest answer takes: 32,768 tokens at 27 ms each.
REORDER_ROWS = 2**16  # A gateway at its full speed of some 800 a second for 80 s. 0.5 KB each and 8 bytes for each block hash.

_Packed = tuple[TraceRow, array]


def in_order(
    rows: Iterable[tuple[int, TraceRow]], late: Callable[[int, TraceRow, float], Exception]
) -> Iterator[tuple[int, TraceRow]]:
    """The rows by arrival, those of one time as they came. Each comes, and goes, with its line.

    Raises `late(line, row, bound_s)` for a row that arrived before `bound_s`, by which later ones had to be let go.
    """
    held: list[tuple[float, int, _Packed]] = []
    newest_s = gone_s = 0.0
    for line, row in rows:
        if row.arrival_s < gone_s:
            raise late(line, row, gone_s)
        newest_s = max(newest_s, row.arrival_s)
        heapq.heappush(held, (row.arrival_s, line, _packed(row)))
        while held[0][0] < newest_s - REORDER_S or len(held) > REORDER_ROWS:
            gone_s, at, first = heapq.heappop(held)
            yield at, _unpacked(*first)
    held.sort()
    yield from ((at, _unpacked(*packed)) for _, at, packed in held)


def _packed(row: TraceRow) -> _Packed:
    """A row whose hashes, nearly all of it, take a fifth of the memory."""
    return (replace(row, block_hashes=()) if row.block_hashes else row), array("Q", row.block_hashes)


def _unpacked(row: TraceRow, hashes: array) -> TraceRow:
    return replace(row, block_hashes=tuple(hashes)) if hashes else row
