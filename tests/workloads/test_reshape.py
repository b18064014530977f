"""A window starts at 0, and scaling keeps what prompts share."""

import itertools

from cluster.record import TraceRow
from workloads.reshape import Scale, window


def rows():
    return (TraceRow(arrival_s=float(at), prompt_tokens=1024, output_tokens=100) for at in itertools.count())


def test_a_window_of_an_endless_ordered_trace_ends():
    assert [row.arrival_s for row in window(rows(), 5, 3)] == [0, 1, 2]


def test_scaling_keeps_the_number_of_shared_blocks():
    row = TraceRow(arrival_s=8, prompt_tokens=2048, output_tokens=100, block_hashes=(1, 2, 3, 4), block_tokens=512)
    assert Scale(prompt=0.1, output=0.5, rate=2)(row) == TraceRow(
        arrival_s=4, prompt_tokens=205, output_tokens=50, block_hashes=(1, 2, 3, 4), block_tokens=51
    )


def test_lengths_stay_within_their_bounds():
    row = TraceRow(arrival_s=0, prompt_tokens=2048, output_tokens=0)
    scaled = Scale(max_prompt_tokens=100, max_output_tokens=10)(row)
    assert (scaled.prompt_tokens, scaled.output_tokens) == (100, 1)
