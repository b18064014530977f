from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from cluster.kv import KvLayout, KvNamespace, block_hashes, blocks_for, next_block_hash

token_lists = st.lists(st.integers(0, 3), max_size=40)
namespaces = st.builds(
    KvNamespace, model=st.sampled_from(["m", "n"]), salt=st.sampled_from(["", "s"]), block_tokens=st.sampled_from([4, 8])
)


@given(token_lists, token_lists, namespaces, namespaces)
def test_hashes_are_equal_exactly_for_equal_prefixes_in_one_namespace(
    one: list[int], other: list[int], here: KvNamespace, there: KvNamespace
) -> None:
    left, right = block_hashes(one, here), block_hashes(other, there)
    for blocks in range(1, min(len(left), len(right)) + 1):
        size = here.block_tokens
        same = here == there and one[: blocks * size] == other[: blocks * size]
        assert (left[blocks - 1] == right[blocks - 1]) == same


@given(token_lists, namespaces)
def test_only_full_blocks_are_hashed(tokens: list[int], namespace: KvNamespace) -> None:
    assert len(block_hashes(tokens, namespace)) == len(tokens) // namespace.block_tokens


@given(token_lists, token_lists, namespaces)
def test_more_tokens_leave_earlier_hashes_as_they_were(tokens: list[int], more: list[int], namespace: KvNamespace) -> None:
    before = block_hashes(tokens, namespace)
    assert block_hashes(tokens + more, namespace)[: len(before)] == before


@given(token_lists, namespaces)
def test_hashes_may_be_chained_a_block_at_a_time(tokens: list[int], namespace: KvNamespace) -> None:
    parent, size, chained = namespace.root(), namespace.block_tokens, []
    for start in range(0, len(tokens) - size + 1, size):
        parent = next_block_hash(parent, tokens[start : start + size])
        chained.append(parent)
    assert chained == block_hashes(tokens, namespace)


def test_every_field_of_a_namespace_tells_it_apart() -> None:
    base = KvNamespace(model="m")
    others = [
        msgspec.structs.replace(base, **{field: value})
        for field, value in {
            "model": "n",
            "revision": "r",
            "adapter": "a",
            "salt": "s",
            "dtype": "float16",
            "block_tokens": 32,
        }.items()
    ]
    assert len({namespace.root() for namespace in (base, *others)}) == 7


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_blocks_hold_their_tokens_and_one_fewer_would_not(tokens: int, block_tokens: int) -> None:
    blocks = blocks_for(tokens, block_tokens)
    assert (blocks - 1) * block_tokens < tokens <= blocks * block_tokens or blocks == tokens == 0


def test_bytes_of_a_layout() -> None:
    layout = KvLayout(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16")
    assert (layout.layer_token_bytes, layout.token_bytes, layout.block_bytes) == (4096, 128 * 1024, 2 * 1024 * 1024)
