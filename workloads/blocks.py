"""A row's block hashes at another block size: a trace hashes its own blocks, a replica caches its own.

A replica's block is known by the trace's block that holds its last token, whose hash stands for the whole prefix up to its end,
and by where in that block it ends. So equal prefixes stay equal, and unequal ones unequal. What two prompts share within a
trace's block that differs further on is not known, and not shared.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cluster.record import TraceRow

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio, odd: successive multiples are well apart.
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)


def split_blocks(row: TraceRow, block_tokens: int) -> tuple[int, ...]:
    """Hashes of the prompt's full blocks of `block_tokens` >= 1 tokens, first block first, as far as the row's hashes reach.

    The row's own hashes where the sizes are equal, every n-th of them where its blocks are finer by the whole number n.
    """
    size, hashes = row.block_tokens, row.block_hashes
    full = min(row.prompt_tokens, len(hashes) * size) // block_tokens
    if size == block_tokens:
        return hashes[:full]
    if block_tokens % size == 0:
        step = block_tokens // size
        return hashes[step - 1 : full * step : step]
    if not full:
        return ()
    ends = np.arange(block_tokens, (full + 1) * block_tokens, block_tokens)
    places = (ends - 1) // size
    parents = np.array(hashes[: places[-1] + 1], dtype=np.uint64)
    return tuple(mixed(parents[places], (ends - places * size).astype(np.uint64)).tolist())


def mixed(parents: NDArray[np.uint64], places: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash for each parent's hash and place: the `place`-th number of the SplitMix64 generator seeded with the parent.

    One to one in the parent for a given place, and in the place for a given parent. Source: G. Steele, D. Lea, C. Flood, Fast
    Splittable Pseudorandom Number Generators (OOPSLA 2014), figure 13; the constants are of D. Stafford's variant 13 of the mix.
    """
    state = parents + places * _GOLDEN
    state = (state ^ (state >> _30)) * _FIRST
    state = (state ^ (state >> _27)) * _SECOND
    return state ^ (state >> _31)
