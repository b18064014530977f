"""Who holds which block, and which blocks hold a prefix that others may share.

A block is free (nobody holds it, nothing worth keeping in it), held (by one request or more), or cached (nobody holds it, but
its prefix may be asked for again). Cached blocks count as free: they are evicted, least recently used first, when the free ones
run out. Bookkeeping only, without tensors, and not thread-safe: each engine has a lock of its own.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cluster.kv import KvCleared, KvEvent, KvRemoved, KvStored


class _Prefix(NamedTuple):
    """What a shareable block holds."""

    digest: int
    parent: int | None
    """Digest of the block before it; None at the start of a prompt."""
    tokens: tuple[int, ...]


class BlockPool:
    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._untouched = 0
        """The first block that was never held, and so are all after it."""
        self._free: list[int] = []
        self._holders: Counter[int] = Counter()
        self._prefix_of: dict[int, _Prefix] = {}
        self._block_of: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._events: list[KvEvent] = []

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return self.blocks - self._untouched + len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        return self.blocks - self.available

    @property
    def cached(self) -> int:
        """Blocks that nobody holds and somebody may share."""
        return len(self._cached)

    def match(self, digests: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """The longest run of shareable blocks that begins a prompt. Holds nothing yet: see `hold`."""
        found: list[int] = []
        parent = None
        for i, digest in enumerate(digests):
            block = self._block_of.get(digest)
            wanted = _Prefix(digest, parent, tuple(tokens[i * self.block_tokens : (i + 1) * self.block_tokens]))
            if block is None or self._prefix_of[block] != wanted:
                break
            found.append(block)
            parent = digest
        return found

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to blocks that `match` found."""
        for block in blocks:
            self._cached.pop(block, None)
            self._holders[block] += 1

    def unheld(self, blocks: Iterable[int]) -> int:
        """How many of these blocks `hold` would take from the available ones."""
        return sum(block in self._cached for block in blocks)

    def allocate(self, count: int) -> list[int] | None:
        """Blocks with one holder and nothing in them, or None where there are not so many."""
        if count > self.available:
            return None
        blocks = [self._empty() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Take a holder away. The last block goes first, so that eviction shortens prefixes from their end."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} released by nobody"
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._prefix_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def share(self, blocks: Sequence[int], digests: Sequence[int], tokens: Sequence[int], first: int) -> None:
        """Let others find a sequence's full blocks from index `first` on; `blocks` and `digests` begin at index 0.

        A prefix that another block already holds stays with that block.
        """
        size = self.block_tokens
        for i in range(first, len(digests)):
            if digests[i] in self._block_of or blocks[i] in self._prefix_of:
                continue
            prefix = _Prefix(digests[i], digests[i - 1] if i else None, tuple(tokens[i * size : (i + 1) * size]))
            self._block_of[prefix.digest] = blocks[i]
            self._prefix_of[blocks[i]] = prefix
            self._stored(prefix)

    def take_events(self) -> tuple[KvEvent, ...]:
        events, self._events = tuple(self._events), []
        return events

    def picture(self) -> tuple[KvEvent, ...]:
        """KvCleared, then everything shareable."""
        return (
            KvCleared(),
            *(
                KvStored(parent=prefix.parent, hashes=(prefix.digest,), tokens=prefix.tokens, block_tokens=self.block_tokens)
                for prefix in self._prefix_of.values()
            ),
        )

    def _empty(self) -> int:
        if self._free:
            return self._free.pop()
        if self._untouched < self.blocks:
            self._untouched += 1
            return self._untouched - 1
        return self._evict()

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        digest = self._prefix_of.pop(block).digest
        del self._block_of[digest]
        match self._events[-1:]:
            case [KvRemoved(hashes=hashes)]:
                self._events[-1] = KvRemoved(hashes=(*hashes, digest))
            case _:
                self._events.append(KvRemoved(hashes=(digest,)))
        return block

    def _stored(self, prefix: _Prefix) -> None:
        match self._events[-1:]:
            case [KvStored(hashes=hashes) as last] if hashes[-1] == prefix.parent:
                joined = (*hashes, prefix.digest), (*last.tokens, *prefix.tokens)
                self._events[-1] = KvStored(parent=last.parent, hashes=joined[0], tokens=joined[1], block_tokens=self.block_tokens)
            case _:
                self._events.append(
                    KvStored(parent=prefix.parent, hashes=(prefix.digest,), tokens=prefix.tokens, block_tokens=self.block_tokens)
                )
