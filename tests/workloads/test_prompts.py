"""A prompt has its row's length and shares exactly what the row shares."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.record import TraceRow
from workloads.prompts import TOKEN_IDS, text_prompt, token_prompt


def row(prompt_tokens, *hashes, block_tokens=16):
    return TraceRow(arrival_s=0, prompt_tokens=prompt_tokens, output_tokens=1, block_hashes=hashes, block_tokens=block_tokens)


@given(st.integers(1, 500), st.lists(st.integers(0, 2**64 - 1), max_size=40), st.integers(1, 64))
def test_token_prompts_are_exact(tokens, hashes, block_tokens):
    prompt = token_prompt(row(tokens, *hashes, block_tokens=block_tokens), 0)
    assert len(prompt) == tokens
    assert set(prompt) <= set(TOKEN_IDS)


def test_rows_share_the_blocks_with_equal_hashes_and_no_more():
    one, two = token_prompt(row(60, 1, 2), 0), token_prompt(row(60, 1, 3), 1)
    assert one[:16] == two[:16]
    assert one[16:32] != two[16:32]
    assert one[32:] != two[32:]


def test_rows_without_hashes_differ_but_are_the_same_next_time():
    assert token_prompt(row(40), 0) == token_prompt(row(40), 0)
    assert token_prompt(row(40), 0) != token_prompt(row(40), 1)
    assert token_prompt(row(40), 0) != token_prompt(row(40), 0, seed=1)


def test_text_shares_its_opening_words_and_has_three_words_for_four_tokens():
    one, two = text_prompt(row(80, 1, 2), 0).split(), text_prompt(row(80, 1, 3), 1).split()
    assert len(one) == len(two) == 60
    assert one[:12] == two[:12]
    assert one != two
