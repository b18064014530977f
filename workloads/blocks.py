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
    return tuple(numbers(mixed(parents)[places], (ends - places * size).astype(np.uint64)).tolist())


def numbers(seeds: NDArray[np.uint64], places: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Of the SplitMix64 generator with each seed the number at each place, from 1: one to one in the seed, and in the place.

    Seeds that may be a multiple of its constant apart would meet, so counted or given ones are `mixed` before.
    Source: G. Steele, D. Lea, C. Flood, Fast Splittable Pseudorandom Number Generators (OOPSLA 2014), figure 13.
    """
    return mixed(seeds + places * _GOLDEN)


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each value scattered over 64 bits, one to one: the last step of SplitMix64, with D. Stafford's constants (his variant 13)."""
    values = (values ^ (values >> _30)) * _FIRST
    values = (values ^ (values >> _27)) * _SECOND
    return values ^ (values >> _31)
