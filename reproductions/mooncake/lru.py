"""Hits of one prefix cache that all prompts of a trace go through, at block granularity, least recently used first to go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from cluster.record import TraceRow


def hit_rate(rows: Iterable[TraceRow], capacity_blocks: int | None) -> float:
    """Share of all prompt tokens that are in the cache when their prompt comes. capacity_blocks: None is without bound."""
    blocks: OrderedDict[int, None] = OrderedDict()
    hits = tokens = 0
    for row in rows:
        found = 0
        while found < len(row.block_hashes) and row.block_hashes[found] in blocks:
            found += 1
        hits += min(found * row.block_tokens, row.prompt_tokens)
        tokens += row.prompt_tokens
        # The last first, so that eviction shortens prefixes from their end.
        for block in reversed(row.block_hashes):
            blocks[block] = None
            blocks.move_to_end(block)
        while capacity_blocks is not None and len(blocks) > capacity_blocks:
            blocks.popitem(last=False)
    return hits / tokens
