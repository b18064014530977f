"""What a search knows of its traffic beforehand is what is in it."""

from __future__ import annotations

import pytest

from cluster.performance import PerformanceModel
from cluster.record import TraceRow
from simulator.survey import survey

MODEL = PerformanceModel(step_s=0.01, prefill_token_s=1e-4, sequence_s=1e-4)


def rows(times_s, **more):
    return [TraceRow(arrival_s=at_s, prompt_tokens=160, output_tokens=10, **more) for at_s in times_s]


def test_means_and_count_leave_out_what_does_not_count():
    found = survey(rows(range(101)), 50.0, MODEL)
    assert found.requests == 51
    assert found.mean.rate_rps == pytest.approx(1.01)
    assert (found.mean.prompt_tokens, found.mean.output_tokens) == (160, 10)


def test_slice_is_the_busiest_stretch_after_the_warm_up():
    times_s = sorted([*range(1000), *(at / 10 for at in range(100, 400)), *(600 + at / 5 for at in range(200))])
    assert survey(rows(times_s), 0.0, MODEL).slice.start_s < 50
    found = survey(rows(times_s), 100.0, MODEL)
    assert found.slice.start_s <= 600 <= 640 <= found.slice.start_s + found.slice.span_s + 1
    assert found.slice.start_s >= 100.0


def test_short_traffic_has_no_slice():
    assert survey(rows(range(150)), 0.0, MODEL).slice is None


def test_known_prefixes_count_as_cached_up_to_the_first_new_block():
    shared = [TraceRow(arrival_s=at, prompt_tokens=64, output_tokens=1, block_hashes=(1, 2, at + 10, 3)) for at in range(3)]
    found = survey(shared, 0.0, MODEL)
    assert found.shared
    assert found.mean.prompt_tokens == pytest.approx(64 - (0 + 32 + 32) / 3)
    assert found.mean.context_tokens == 64
