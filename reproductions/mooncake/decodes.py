"""The pool that decodes: who is on which node, how loaded it is and will be, and when a request is refused."""

from __future__ import annotations

import math
from collections import deque
from typing import Literal

import numpy as np

from cluster.step_table import StepTable
from reproductions.mooncake.flight import Flight
from reproductions.mooncake.machines import memory_tokens
from simulator.engines import Engines
from simulator.steps.engines import KV_TOKENS
from simulator.steps.records import CHUNKED

Admission = Literal["none", "late", "present", "predicted"]
"""When the load of decoding refuses a request (Mooncake, arXiv v4, section 7). none: it waits for room. late: once its prompt is
computed. present: already as it comes, on the load of that moment. predicted: as it comes, on the load when its prompt is done.
The last two look again once the prompt is computed."""

BLOCK_TOKENS, PLACES, STEP_TOKENS = 16, 512, 2048
ROOM_SHARE = 0.95
"""Of a node's KV room: full is full but for what answers grow by while they are decoded (3 % of the trace's prompts)."""
NEWEST = 1 / 64
"""Weight of one request in the mean time that decoding takes."""


class DecodeNode:
    """One node."""

    def __init__(self, engine: int, name: str) -> None:
        self.engine, self.name = engine, name
        self.coming: dict[Flight, None] = {}
        """Whose prompt is not computed yet."""
        self.joined: dict[Flight, float] = {}
        """Who decodes, or whose KV is on its way, and since when."""
        self.waiting: deque[Flight] = deque()
        """Whose prompt is computed, and for whose KV there was no room."""
        self.moving_tokens = 0
        """KV on its way."""


class DecodePool:
    """All nodes that decode."""

    def __init__(self, engines: Engines, times: StepTable, nodes: int, tbt_s: float) -> None:
        self._engines, self._times, self._tbt_s = engines, times, tbt_s
        self._room_tokens = ROOM_SHARE * memory_tokens()
        model = engines.model(times)
        self.nodes = tuple(
            DecodeNode(
                engines.add(
                    model=model,
                    kv_blocks=memory_tokens() // BLOCK_TOKENS,
                    block_tokens=BLOCK_TOKENS,
                    max_running=PLACES,
                    step_budget_tokens=STEP_TOKENS,
                    batching=CHUNKED,
                ),
                f"decodes-{number}",
            )
            for number in range(nodes)
        )
        self._rows = np.array([node.engine for node in self.nodes], np.int32)
        self._decoding_s = math.inf
        """Mean time from a prompt's end to the last token; endless before the first has ended."""
        self._answer_tokens = 0.0

    def _kv_tokens(self, now_s: float) -> list[float]:
        kept = self._engines.loads(self._rows, now_s)[:, KV_TOKENS].tolist()
        return [tokens + node.moving_tokens for tokens, node in zip(kept, self.nodes, strict=True)]

    def load(self, sequences: float, tokens: float) -> float:
        """Of one node: 1 where a step takes as long as a gap may, or where all KV room is used."""
        return max(self._times.decode_step_s(round(sequences), round(tokens)) / self._tbt_s, tokens / self._room_tokens)

    def choose(self, prompt_tokens: int, now_s: float) -> DecodeNode:
        """The node with the least load once all who were sent there are there."""

        def promised(index: int) -> float:
            node = self.nodes[index]
            ahead = [*node.coming, *node.waiting]
            tokens = kept[index] + sum(flight.prompt for flight in ahead) + prompt_tokens
            return self.load(len(node.joined) + len(ahead) + 1, tokens)

        kept = self._kv_tokens(now_s)
        return self.nodes[min(range(len(self.nodes)), key=promised)]

    def present_load(self, node: DecodeNode, now_s: float) -> float:
        """Of those on it now."""
        return self.load(len(node.joined), self._kv_tokens(now_s)[self.nodes.index(node)])

    def predicted_load(self, at_s: float) -> float:
        """Mean of all nodes at a time to come: everybody decodes for the same time from his prompt's end on."""
        beginnings = [(flight, since_s) for node in self.nodes for flight, since_s in node.joined.items()]
        beginnings += [(flight, flight.prompt_ends_s) for node in self.nodes for flight in node.coming]
        there = [flight.prompt for flight, since_s in beginnings if since_s <= at_s < since_s + self._decoding_s]
        tokens = sum(there) + self._answer_tokens / 2 * len(there)
        return self.load(len(there) / len(self.nodes), tokens / len(self.nodes))

    def mean_load(self, now_s: float) -> float:
        """Over nodes, of that moment."""
        kept = self._kv_tokens(now_s)
        return sum(self.load(len(node.joined), tokens) for node, tokens in zip(self.nodes, kept, strict=True)) / len(self.nodes)

    def ended(self, flight: Flight, now_s: float) -> None:
        """It has had its last token."""
        lasted_s = now_s - flight.target.joined.pop(flight)
        if math.isinf(self._decoding_s):
            self._decoding_s, self._answer_tokens = lasted_s, flight.output
        self._decoding_s += NEWEST * (lasted_s - self._decoding_s)
        self._answer_tokens += NEWEST * (flight.output - self._answer_tokens)

    def reserve(self, flight: Flight, now_s: float) -> bool:
        return self._engines.reserve(flight.row, flight.target.engine, now_s)
