"""Which tokens of which sequences the next step computes.

Stall-free batching (Sarathi-Serve, arXiv:2403.02310): every decoding sequence first, then what the token budget leaves goes to
prompts already begun, then to new ones, by priority and arrival. A prompt's blocks are taken whole when it is admitted, a
decoding sequence's one by one; when there is none left, the newest sequence of the lowest priority gives its blocks back and
is computed again later, from its prompt and what it has generated.
"""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple

from cluster.kv import blocks_for
from workers.engines.block_pool import BlockPool
from workers.engines.torch_engine.sequence import Sequence


class Work(NamedTuple):
    """Compute so many of a sequence's missing tokens."""

    sequence: Sequence
    count: int


class Scheduler:
    def __init__(self, pool: BlockPool, *, max_running: int, step_budget_tokens: int) -> None:
        self.pool = pool
        self.running: list[Sequence] = []
        """By rank, as `waiting`."""
        self.waiting: list[Sequence] = []
        self.reserved = 0
        """Places kept for requests whose KV is on its way."""
        self.preemptions = 0
        self.cached_tokens = 0
        # With more decodes than budget a prompt would never get its turn.
        self.max_running = min(max_running, step_budget_tokens)
        self._budget = step_budget_tokens

    @property
    def full(self) -> bool:
        return len(self.running) + self.reserved >= self.max_running

    def enqueue(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_rank)

    def adopt(self, sequence: Sequence) -> None:
        """Run a sequence that has its blocks already."""
        insort(self.running, sequence, key=_rank)

    def plan(self, now_s: float) -> list[Work]:
        """The next step: sequences that compute one token first, the longest context first."""
        decodes = self._decodes()
        budget = self._budget - len(decodes)
        chunks = []
        for sequence in self.running:
            if sequence.missing > 1 and budget > 0:
                chunks.append(Work(sequence, min(sequence.missing, budget)))
                budget -= chunks[-1].count
        chunks += self._admit(budget, now_s)
        ones = [*(Work(sequence, 1) for sequence in decodes), *(work for work in chunks if work.count == 1)]
        ones.sort(key=lambda work: -work.sequence.computed)
        return ones + [work for work in chunks if work.count > 1]

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.pool.release(sequence.drop_blocks())

    def computed(self, work: Work) -> None:
        """A step is done: count its tokens, and share the blocks it has filled."""
        sequence = work.sequence
        sequence.computed += work.count
        full = sequence.computed // self.pool.block_tokens
        if full > sequence.shared_blocks:
            self.pool.share(sequence.blocks, sequence.digests[:full], sequence.tokens, sequence.shared_blocks)
            sequence.shared_blocks = full

    def _decodes(self) -> list[Sequence]:
        decodes, index = [], 0
        while index < len(self.running):
            sequence = self.running[index]
            if sequence.missing > 1 or self._grow(sequence):
                if sequence.missing == 1:
                    decodes.append(sequence)
                index += 1
        return decodes

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for one more token, at others' cost if need be. False: it lost its own blocks."""
        if len(sequence.blocks) * self.pool.block_tokens > sequence.computed:
            return True
        while (blocks := self.pool.allocate(1)) is None:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.take(blocks)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.remove(victim)
        victim.preempted = True
        self.preemptions += 1
        self.enqueue(victim)

    def _admit(self, budget: int, now_s: float) -> list[Work]:
        admitted: list[Work] = []
        pending = self._pending() if self.waiting and budget > 0 else {}
        passed = 0
        while budget > 0 and passed < len(self.waiting) and not self.full:
            sequence = self.waiting[passed]
            found = self._found(sequence)
            following = sequence.digests[len(found)] if len(found) < len(sequence.digests) else None
            if following in pending and pending[following] <= sequence.rank:
                # The next block of its prompt is being computed already: it is there for the sharing a step later.
                passed += 1
                continue
            if not self._place(sequence, found):
                break
            del self.waiting[passed]
            insort(self.running, sequence, key=_rank)
            if sequence.started_s is None:
                sequence.started_s, sequence.cached_tokens = now_s, sequence.computed
                self.cached_tokens += sequence.computed
            admitted.append(Work(sequence, min(sequence.missing, budget)))
            budget -= admitted[-1].count
            pending.update(dict.fromkeys(sequence.digests[len(found) :], sequence.rank))
        return admitted

    def _pending(self) -> dict[int, tuple[int, int]]:
        """Digests of the blocks that running prompts are about to fill, with the rank of who does."""
        pending = {}
        for sequence in reversed(self.running):
            if sequence.missing > 1:
                pending.update(dict.fromkeys(sequence.digests[sequence.shared_blocks :], sequence.rank))
        return pending

    def _found(self, sequence: Sequence) -> list[int]:
        """Blocks of its prefix that are here; its last token is always computed, for the logits after it."""
        shareable = (len(sequence.tokens) - 1) // self.pool.block_tokens
        return self.pool.match(sequence.digests[:shareable], sequence.tokens)

    def _place(self, sequence: Sequence, found: list[int]) -> bool:
        needed = blocks_for(len(sequence.tokens), self.pool.block_tokens) - len(found)
        # A preempted sequence comes back only with room for others to grow, else it would be preempted again at once.
        spare = len(self.running) if sequence.preempted else 0
        if needed + spare + self.pool.unheld(found) > self.pool.available:
            return False
        self.pool.hold(found)
        sequence.take(found)
        blocks = self.pool.allocate(needed)
        assert blocks is not None, f"{needed} blocks counted as available are not"
        sequence.take(blocks)
        sequence.computed = len(found) * self.pool.block_tokens
        sequence.shared_blocks = len(found)
        return True


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank
