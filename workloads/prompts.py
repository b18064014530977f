"""Turns a trace row, which has no text, into a prompt of its length; rows with equal block hashes get equal openings.

Token ids give the exact length. Words only come near it, at three words for four tokens, the usual rule for English.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

from cluster.record import TraceRow

TOKEN_IDS = range(16, 256)  # Ordinary tokens in any byte-level vocabulary: above the special ones, below its end.
WORDS_PER_TOKEN = 0.75


def token_prompt(row: TraceRow, index: int, *, seed: int = 0, ids: range = TOKEN_IDS) -> list[int]:
    """Exactly `row.prompt_tokens` token ids. From `index`, the row's place in the trace, is drawn what it shares with nobody."""
    blocks = _blocks(row, index, seed, row.block_tokens, row.prompt_tokens)
    return [token for random, count in blocks for token in random.choices(ids, k=count)]


def text_prompt(row: TraceRow, index: int, *, seed: int = 0) -> str:
    """Words of the bundled passage (opening of Moby-Dick, 1851), about `row.prompt_tokens` tokens long."""
    words = max(1, round(row.prompt_tokens * WORDS_PER_TOKEN))
    block_words = max(1, round(row.block_tokens * WORDS_PER_TOKEN))
    return " ".join(word for random, count in _blocks(row, index, seed, block_words, words) for word in _run(random, count))


def _blocks(row: TraceRow, index: int, seed: int, block: int, length: int) -> list[tuple[Random, int]]:
    """A source of chance and a length for each block: by hash as far as hashes go, then one for the rest."""
    starts = range(0, length, block)[: len(row.block_hashes)]
    blocks = [(Random(f"{seed}/{row.block_hashes[i]}"), min(block, length - start)) for i, start in enumerate(starts)]
    rest = length - sum(count for _, count in blocks)
    return [*blocks, (Random(f"{seed}//{index}"), rest)] if rest else blocks


def _run(random: Random, count: int) -> list[str]:
    """Consecutive words from a random place of the passage, which starts again at its end."""
    words = _passage()
    start = random.randrange(len(words))
    return [words[(start + place) % len(words)] for place in range(count)]


@cache
def _passage() -> tuple[str, ...]:
    return tuple(Path(__file__).with_name("passage.txt").read_text(encoding="utf-8").split())
