"""One request on its way through the two pools."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.record import TraceRow
from reproductions.mooncake.machines import BLOCK_TOKENS

if TYPE_CHECKING:
    from reproductions.mooncake.decodes import DecodeNode
    from reproductions.mooncake.prompts import PromptNode


class Flight:
    """As it stands."""

    __slots__ = ("arrival_s", "cached", "hashes", "output", "prompt", "prompt_ends_s", "row", "source", "target")

    source: PromptNode
    target: DecodeNode

    def __init__(self, trace: TraceRow, arrival_s: float) -> None:
        self.arrival_s = arrival_s
        self.prompt, self.output = trace.prompt_tokens, max(1, trace.output_tokens)
        # At least one token of a prompt is computed, as it makes the first token of the answer.
        self.hashes = trace.block_hashes[: (trace.prompt_tokens - 1) // BLOCK_TOKENS]
        self.row = -1
        """In the engines, of its decoding."""
        self.prompt_ends_s = 0.0
        """Expected."""
        self.cached = 0
