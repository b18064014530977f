"""Who holds which block, and how deep a prompt's prefix goes at each replica."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.kv import KvCleared, KvEvent, KvRemoved, KvStored

MAX_ENTRIES = 4 * 2**20  # (replica, block) pairs, some 150 bytes each: well under a gigabyte.
MAX_DEPTHS = 8  # Unlike depths told apart in one answer; a prompt is seldom cached to more.


class PrefixIndex:
    """Block hash -> bitmask of replicas, which are numbered from 0.

    A chained hash stands for its whole prefix, and engines evict from the end, so a replica that holds a block holds those before
    it: the deepest match is found by binary search. Beyond `max_entries` new blocks are not taken in, and counted in `dropped`.
    """

    def __init__(self, *, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._holders: dict[int, int] = {}
        self._held: dict[int, set[int]] = {}
        self.entries = 0
        """(replica, block) pairs held."""
        self.dropped = 0
        """Pairs refused for want of room."""

    def apply(self, replica: int, event: KvEvent) -> None:
        """One event of one replica. Storing twice and removing what is not held do nothing."""
        match event:
            case KvStored():
                self._store(replica, event.hashes)
            case KvRemoved():
                self._drop(replica, self._held.get(replica, set()).intersection(event.hashes))
            case KvCleared():
                self.forget(replica)

    def forget(self, replica: int) -> None:
        """Drop all blocks of a replica; its number may be given to another."""
        self._drop(replica, self._held.pop(replica, set()))

    def match(self, hashes: Sequence[int]) -> list[tuple[int, int]]:
        """(depth in blocks, replicas as a bitmask) of who holds a prefix of `hashes`, deepest first, each replica once.

        At most MAX_DEPTHS pairs; who is less deep than the last of them is left out.
        """
        holders = self._holders
        depths: list[tuple[int, int]] = []
        seen, limit = 0, len(hashes)
        anyone = holders.get(hashes[0], 0) if hashes else 0
        while anyone & ~seen and limit and len(depths) < MAX_DEPTHS:
            low, high, found = 1, limit, anyone & ~seen
            while low < high:
                middle = (low + high + 1) // 2
                fresh = holders.get(hashes[middle - 1], 0) & ~seen
                if fresh:
                    low, found = middle, fresh
                else:
                    high = middle - 1
            depths.append((low, found))
            seen |= found
            limit = low - 1
        return depths

    def _store(self, replica: int, hashes: Sequence[int]) -> None:
        held = self._held.setdefault(replica, set())
        bit = 1 << replica
        for block in hashes:
            if block in held:
                continue
            if self.entries >= self._max_entries:
                self.dropped += 1
                continue
            held.add(block)
            self._holders[block] = self._holders.get(block, 0) | bit
            self.entries += 1

    def _drop(self, replica: int, blocks: set[int]) -> None:
        bit = 1 << replica
        held = self._held.get(replica, set())
        for block in blocks:
            held.discard(block)
            left = self._holders[block] & ~bit
            if left:
                self._holders[block] = left
            else:
                del self._holders[block]
        self.entries -= len(blocks)
