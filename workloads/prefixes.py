"""Block hashes of made-up prompts: of each the first blocks are of an opening that others share, the rest are its own.

An opening and a prompt's own part are each a seed; the block at a place has the seed's number at that place
(`workloads.blocks.numbers`), so that prompts with equal seeds have equal prefixes as far as both reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.kv import BLOCK_TOKENS
from workloads.blocks import numbers
from workloads.chance import stream

BATCH_BLOCKS = 2**17  # Hashed at once: some 10 MB while they are handed out.

Seeds = NDArray[np.uint64]
Counts = NDArray[np.int64]


def seeds(chance: np.random.Generator, count: int) -> Seeds:
    return chance.integers(0, 2**64, count, dtype=np.uint64)


def prompt_hashes(prompt_tokens: Counts, openings: Seeds, opening_tokens: Counts, own: Seeds) -> Iterator[tuple[int, ...]]:
    """Hashes of the full blocks of each prompt, whose first `opening_tokens` are of the opening with that seed."""
    blocks = prompt_tokens // BLOCK_TOKENS
    opening = np.minimum(blocks, opening_tokens // BLOCK_TOKENS)
    batch = max(1, BATCH_BLOCKS // int(blocks.max(initial=1)))
    for start in range(0, len(blocks), batch):
        part = slice(start, start + batch)
        yield from _hashes(blocks[part], opening[part], openings[part], own[part])


def _hashes(blocks: Counts, opening: Counts, openings: Seeds, own: Seeds) -> Iterator[tuple[int, ...]]:
    ends = np.cumsum(blocks)
    places = np.arange(1, ends[-1] + 1) - np.repeat(ends - blocks, blocks)
    runs = np.column_stack((opening, blocks - opening)).ravel()
    drawn = numbers(np.repeat(np.column_stack((openings, own)).ravel(), runs), places.astype(np.uint64)).tolist()
    for start, end in zip((ends - blocks).tolist(), ends.tolist(), strict=True):
        yield tuple(drawn[start:end])


class Prefixes(msgspec.Struct, frozen=True, kw_only=True):
    """Common prefixes, each as likely, that a share of the prompts opens with."""

    share: float = 0.0
    """In [0, 1]; with 0 rows say nothing of their blocks."""
    tokens: int = 0
    """Length of each; what fills no block is not shared."""
    count: int = 1

    def drawing(self, seed: int) -> PrefixDrawing:
        return PrefixDrawing(self, seed)


class PrefixDrawing:
    """Prefixes with the seeds of their blocks, and the streams of chance that choose between them."""

    def __init__(self, prefixes: Prefixes, seed: int) -> None:
        self._prefixes = prefixes
        self._openings = seeds(stream(seed, "openings"), prefixes.count)
        self._shared, self._chosen, self._own = (stream(seed, concern) for concern in ("shared", "chosen", "prefixes"))

    def next(self, prompt_tokens: Counts) -> Iterator[tuple[int, ...]]:
        """Block hashes of the next prompts."""
        count = len(prompt_tokens)
        if self._prefixes.share == 0.0:
            return repeat((), count)
        opening_tokens = np.where(self._shared.random(count) < self._prefixes.share, self._prefixes.tokens, 0)
        openings = self._openings[self._chosen.integers(self._prefixes.count, size=count)]
        return prompt_hashes(prompt_tokens, openings, opening_tokens, seeds(self._own, count))
