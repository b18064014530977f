"""Errors are of simulated against live, figure by figure."""

from __future__ import annotations

import pytest

from benchmarks.agreement import agreement, mean_error
from cluster.errors import InvalidTrace
from cluster.slo import RequestTiming


def answered(ttft_s: float, tpot_s: float, *, tokens: int = 11, arrival_s: float = 5.0) -> RequestTiming:
    first_s = arrival_s + ttft_s
    last_s = first_s + tpot_s * (tokens - 1)
    return RequestTiming(arrival_s=arrival_s, first_token_s=first_s, last_token_s=last_s, output_tokens=tokens)


LIVE = [answered(0.1 * number, 0.01 * number) for number in range(1, 12)]


def test_what_is_simulated_alike_has_no_error():
    assert agreement("same", LIVE, LIVE).mean_error == 0.0


def test_an_error_is_signed_and_relative_to_what_was_live():
    slower = [answered(0.11 * number, 0.009 * number) for number in range(1, 12)]
    found = agreement("slower", LIVE, slower)
    assert found.errors == pytest.approx({"ttft_p50_s": 0.1, "ttft_p90_s": 0.1, "tpot_p50_s": -0.1, "tpot_p90_s": -0.1})
    assert found.mean_error == pytest.approx(0.1)
    assert mean_error([found, agreement("same", LIVE, LIVE)]) == pytest.approx(0.05)


def test_quantiles_are_of_requests_and_not_of_tokens():
    found = agreement("one long answer", [*LIVE, answered(0.6, 0.06, tokens=1000)], LIVE)
    assert found.live_s["ttft_p50_s"] == pytest.approx(0.6)
    assert found.live_s["tpot_p50_s"] == pytest.approx(0.06)


def test_requests_that_failed_are_left_out_on_either_side():
    failed = RequestTiming(arrival_s=0.0, first_token_s=100.0, last_token_s=200.0, output_tokens=2, error="disconnected")
    found = agreement("with a failure", [*LIVE, failed], [*LIVE, failed])
    assert found.requests == len(LIVE)
    assert found.live_s["ttft_p90_s"] == pytest.approx(1.0)


def test_a_side_without_answers_is_refused_by_name():
    with pytest.raises(InvalidTrace, match=r"quiet, simulated: none of 0 completed requests has a ttft"):
        agreement("quiet", LIVE, [])
    with pytest.raises(InvalidTrace, match="has a tpot"):
        agreement("one token each", [answered(0.1, 0.0, tokens=1)], LIVE)
