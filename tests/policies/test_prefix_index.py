from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.kv import KvCleared, KvRemoved, KvStored
from policies.prefix_index import MAX_DEPTHS, PrefixIndex


def stored(*hashes: int) -> KvStored:
    return KvStored(parent=None, hashes=hashes, tokens=())


def depths_of(index: PrefixIndex, hashes: list[int]) -> dict[int, int]:
    return {row: depth for depth, mask in index.match(hashes) for row in range(mask.bit_length()) if mask >> row & 1}


@given(held=st.dictionaries(st.integers(0, 4095), st.integers(0, 40), max_size=MAX_DEPTHS), length=st.integers(0, 40))
def test_every_holder_is_found_at_its_own_depth(held, length):
    index, prompt = PrefixIndex(), list(range(1000, 1040))
    for row, depth in held.items():
        index.apply(row, stored(*prompt[:depth]))
    assert depths_of(index, prompt[:length]) == {row: min(depth, length) for row, depth in held.items() if min(depth, length)}


def test_only_the_deepest_are_told_apart():
    index, prompt = PrefixIndex(), list(range(1, 41))
    for row in range(40):
        index.apply(row, stored(*prompt[: row + 1]))
    assert [depth for depth, _ in index.match(prompt)] == list(range(40, 40 - MAX_DEPTHS, -1))


@given(
    events=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["store", "remove", "clear"]), st.lists(st.integers(1, 9), max_size=4)),
        max_size=30,
    )
)
def test_the_index_holds_what_the_events_say(events):
    index, model = PrefixIndex(), {row: set() for row in range(4)}
    for row, kind, hashes in events:
        if kind == "store":
            index.apply(row, stored(*hashes))
            model[row] |= set(hashes)
        elif kind == "remove":
            index.apply(row, KvRemoved(hashes=tuple(hashes)))
            model[row] -= set(hashes)
        else:
            index.apply(row, KvCleared())
            model[row] = set()
    for block in range(1, 10):
        assert depths_of(index, [block]) == {row: 1 for row in range(4) if block in model[row]}
    assert index.entries == sum(len(held) for held in model.values())


def test_beyond_its_bound_blocks_are_dropped_and_counted():
    index = PrefixIndex(max_entries=3)
    index.apply(0, stored(1, 2, 3, 4, 5))
    assert (index.entries, index.dropped) == (3, 2)
    index.forget(0)
    index.apply(1, stored(4))
    assert depths_of(index, [4]) == {1: 1}
