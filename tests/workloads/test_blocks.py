"""Block hashes at another size say of prefixes what the trace's own say."""

from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.record import TraceRow
from workloads.blocks import numbers, split_blocks
from workloads.traces import open_trace

SIZES = st.integers(1, 600)
HASHES = st.lists(st.integers(0, 2**64 - 1), max_size=6, unique=True)


def row(hashes, size, tokens=None):
    return TraceRow(
        arrival_s=0.0, prompt_tokens=tokens or max(1, len(hashes) * size), output_tokens=1, block_hashes=hashes, block_tokens=size
    )


def shared(first, second):
    """Blocks at the beginning that two prompts have in common."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))


@given(hashes=HASHES, size=SIZES, wanted=SIZES, tokens=st.integers(1, 4000))
def test_every_full_block_that_the_hashes_reach_has_a_hash(hashes, size, wanted, tokens):
    split = split_blocks(row(hashes, size, tokens), wanted)
    assert len(split) == min(tokens, len(hashes) * size) // wanted
    assert all(type(each) is int and 0 <= each < 2**64 for each in split)


@given(common=HASHES, first=HASHES, second=HASHES, size=SIZES, wanted=SIZES)
def test_prompts_share_as_many_tokens_as_before_in_whole_blocks(common, first, second, size, wanted):
    one, other = [*common, *first], [*common, *second]
    split = [split_blocks(row(tuple(hashes), size), wanted) for hashes in (one, other)]
    assert shared(*split) == shared(one, other) * size // wanted


@given(distinct=HASHES, cuts=st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted), size=SIZES, wanted=SIZES)
def test_blocks_that_are_not_shared_at_the_beginning_are_nowhere_equal(distinct, cuts, size, wanted):
    common, first, second = distinct[: cuts[0]], distinct[cuts[0] : cuts[1]], distinct[cuts[1] :]
    split = [split_blocks(row((*common, *tail), size), wanted) for tail in (first, second)]
    assert all(len(set(each)) == len(each) for each in split)
    assert len(set(split[0]) & set(split[1])) == shared(*split)


@given(hashes=HASHES.map(tuple), size=SIZES, times=st.integers(1, 5))
def test_finer_blocks_of_a_trace_give_every_nth_hash(hashes, size, times):
    assert split_blocks(row(hashes, size), times * size) == hashes[times - 1 :: times]


def test_the_hashes_are_splitmix64s():
    """The first numbers of the published generator for seed 1234567, as its reference implementation prints them."""
    drawn = numbers(np.full(3, 1234567, dtype=np.uint64), np.arange(1, 4, dtype=np.uint64))
    assert drawn.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_row_without_hashes_has_none():
    assert split_blocks(row((), 16, tokens=100), 8) == ()


@pytest.mark.parametrize("wanted", [16, 128])
def test_mooncakes_prompts_share_as_much_in_smaller_blocks(data_dir, wanted):
    seen, split_seen, blocks, hits, split_blocks_, split_hits = set(), set(), 0, 0, 0, 0
    for _, each in zip(range(2000), open_trace(data_dir / "mooncake_fast25/conversation_trace.jsonl"), strict=False):
        own = split_blocks(each, 512)
        split = split_blocks(each, wanted)[: len(own) * 512 // wanted]
        hits, split_hits = hits + len(seen.intersection(own)), split_hits + len(split_seen.intersection(split))
        blocks, split_blocks_ = blocks + len(own), split_blocks_ + len(split)
        seen.update(own)
        split_seen.update(split)
    assert split_blocks_ == blocks * 512 // wanted
    assert split_hits == hits * 512 // wanted > 0
