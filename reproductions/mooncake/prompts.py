"""The pool that computes prompts: each node's queue and cache, and which node a prompt goes to (Mooncake's algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from cluster.step_table import StepTable
from reproductions.mooncake.machines import BLOCK_TOKENS, TOKEN_BYTES
from simulator.engines import Engines, Said
from simulator.links import Links
from simulator.steps.records import CHUNKED, REMOVED, STORED

Sharing = Literal["balanced", "local", "global"]
"""balanced: the shortest queue, whatever it has cached. local: the least TTFT with what each node has itself. global: algorithm 1,
where a node may fetch the longest prefix that any node has."""

CHUNK_TOKENS = 8192
"""Prompt tokens a step. A node takes prompts in turn; a step's rest goes to the next prompt."""
THRESHOLD = 1.5
"""How many times as long the longest prefix must be as a node's own to be worth fetching; the paper gives no value."""
PLACES = 256


class PromptNode:
    """One node."""

    def __init__(self, engine: int, name: str) -> None:
        self.engine, self.name = engine, name
        self.blocks: set[int] = set()
        """Hashes of all that it has cached."""
        self._coming: dict[int, float] = {}
        """Seconds that each prompt sent here and not done yet will take."""
        self._free_s = 0.0

    def prefix(self, hashes: Sequence[int]) -> int:
        """Leading blocks that it has."""
        found = 0
        while found < len(hashes) and hashes[found] in self.blocks:
            found += 1
        return found

    def queue_s(self, now_s: float) -> float:
        """Until all that was sent here is computed."""
        return max(0.0, self._free_s - now_s)

    def promise(self, prompt: int, seconds: float, now_s: float) -> None:
        self._coming[prompt] = seconds
        self._free_s = max(self._free_s, now_s) + seconds

    def done(self, prompt: int, now_s: float) -> None:
        del self._coming[prompt]
        self._free_s = now_s + sum(self._coming.values())


class Choice(NamedTuple):
    """Where a prompt goes."""

    node: PromptNode
    ttft_s: float
    """Expected."""
    computing_s: float
    """Of that, for computing it."""
    prefix: int
    """Leading blocks that will be there."""
    source: PromptNode | None
    """Who sends them; None where nothing is fetched."""


class PromptPool:
    """All nodes that compute prompts."""

    def __init__(self, engines: Engines, times: StepTable, links: Links, nodes: int, cache_tokens: int, sharing: Sharing) -> None:
        self._engines, self._times, self._links, self._sharing = engines, times, links, sharing
        model = engines.model(times)
        self.nodes = tuple(
            PromptNode(
                engines.add(
                    model=model,
                    kv_blocks=cache_tokens // BLOCK_TOKENS,
                    block_tokens=BLOCK_TOKENS,
                    max_running=PLACES,
                    step_budget_tokens=CHUNK_TOKENS,
                    batching=CHUNKED,
                ),
                f"prompts-{number}",
            )
            for number in range(nodes)
        )
        self._by_engine: Mapping[int, PromptNode] = {node.engine: node for node in self.nodes}
        self._turn = 0

    def choose(self, prompt_tokens: int, hashes: Sequence[int], now_s: float) -> Choice:
        """The node with the least expected TTFT; balanced: with the shortest queue, nodes as idle as each other in turn."""
        prefixes = [node.prefix(hashes) for node in self.nodes]
        best = max(prefixes)
        holder = self.nodes[prefixes.index(best)]
        choices = [
            self._choice(node, own, best, holder, prompt_tokens, now_s) for node, own in zip(self.nodes, prefixes, strict=True)
        ]
        self._turn += 1
        turned = [*choices[self._turn % len(choices) :], *choices[: self._turn % len(choices)]]
        if self._sharing == "balanced":
            return min(turned, key=lambda choice: choice.node.queue_s(now_s))
        return min(turned, key=lambda choice: choice.ttft_s)

    def _choice(self, node: PromptNode, own: int, best: int, holder: PromptNode, prompt_tokens: int, now_s: float) -> Choice:
        fetched = best if self._sharing == "global" and best > THRESHOLD * own else own
        moving_s = 0.0
        if fetched > own:
            moving_s = (fetched - own) * BLOCK_TOKENS * TOKEN_BYTES / self._links.share(holder.name, node.name)
        computing_s = self._times.prefill_s(prompt_tokens, fetched * BLOCK_TOKENS)
        ttft_s = moving_s + node.queue_s(now_s) + computing_s
        return Choice(node, ttft_s, computing_s, fetched, holder if fetched > own else None)

    def replicate(self, node: PromptNode, hashes: Sequence[int], now_s: float) -> None:
        """Blocks have come from another node: they are cached here as well. Nothing is, where all room is held."""
        row = self._engines.request(arrival_s=now_s, prompt=len(hashes) * BLOCK_TOKENS, output=2, hashes=hashes)
        if self._engines.reserve(row, node.engine, now_s):
            self._engines.state.requests["generated"][row] = 1
            self._engines.take_over(row, now_s)
            self._engines.take_out(row, now_s)
        self._engines.free(row)

    def heard(self, said: Said) -> None:
        """A node has stored or dropped blocks."""
        blocks = self._by_engine[said.engine].blocks
        if said.kind == STORED:
            blocks.update(said.hashes)
        elif said.kind == REMOVED:
            blocks.difference_update(said.hashes)
