"""No block is lost, held twice, or found under another's prefix."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.kv import KvNamespace, KvRemoved, KvStored, block_hashes
from workers.engines.block_pool import BlockPool

BLOCKS, SIZE = 8, 2
NAMESPACE = KvNamespace(model="m", block_tokens=SIZE)


class Conservation(RuleBasedStateMachine):
    """Requests come with prompts of few distinct tokens, so that prefixes meet; each holds its blocks until it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, SIZE)
        self.held: list[list[int]] = []
        self.content: dict[int, list[int]] = {}
        self.indexed: set[int] = set()

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def come(self, tokens: list[int]) -> None:
        digests = block_hashes(tokens, NAMESPACE)
        found = self.pool.match(digests, tokens)
        for i, block in enumerate(found):
            assert self.content[block] == tokens[: (i + 1) * SIZE]
        needed = -(-len(tokens) // SIZE) - len(found)
        fits = needed + self.pool.unheld(found) <= self.pool.available
        self.pool.hold(found)
        fresh = self.pool.allocate(needed)
        assert (fresh is not None) == fits
        if fresh is None:
            self.pool.release(found)
            return
        blocks = found + fresh
        for i, block in enumerate(blocks):
            self.content[block] = tokens[: (i + 1) * SIZE]
        self.pool.share(blocks, digests, tokens, len(found))
        self.held.append(blocks)

    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        if self.held:
            self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_block_is_somewhere_once(self) -> None:
        held = {block for blocks in self.held for block in blocks}
        assert self.pool.used == len(held)
        assert self.pool.used + self.pool.available == BLOCKS
        assert self.pool.cached <= self.pool.available
        assert not held & set(self.pool._free)

    @invariant()
    def events_tell_what_is_shareable(self) -> None:
        for event in self.pool.take_events():
            match event:
                case KvStored(hashes=hashes):
                    assert not self.indexed & set(hashes)
                    self.indexed |= set(hashes)
                case KvRemoved(hashes=hashes):
                    self.indexed -= set(hashes)
        assert self.indexed == {event.hashes[0] for event in self.pool.picture()[1:]}


TestConservation = Conservation.TestCase
TestConservation.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_equal_hashes_of_unlike_tokens_are_no_hit():
    pool = BlockPool(4, SIZE)
    blocks = pool.allocate(1)
    pool.share(blocks, [7], [1, 2], 0)
    assert pool.match([7], [1, 2]) == blocks
    assert pool.match([7], [1, 3]) == []


def test_the_least_recently_used_prefix_goes_first_and_from_its_end():
    pool = BlockPool(4, SIZE)
    old, new = pool.allocate(2), pool.allocate(2)
    pool.share(old, [1, 2], [0, 0, 0, 1], 0)
    pool.share(new, [3, 4], [1, 0, 1, 1], 0)
    pool.release(old)
    pool.release(new)
    pool.take_events()
    pool.allocate(3)
    assert pool.take_events() == (KvRemoved(hashes=(2, 1, 4)),)
