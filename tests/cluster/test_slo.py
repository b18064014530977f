from __future__ import annotations

import pytest

from cluster.slo import RequestTiming, Slo, goodput_rps, meets

KEPT = RequestTiming(arrival_s=10.0, first_token_s=10.5, last_token_s=12.5, output_tokens=21)


def test_times_count_from_arrival_and_tpot_from_the_first_token() -> None:
    assert (KEPT.ttft_s, KEPT.tpot_s, KEPT.e2e_s) == (0.5, 0.1, 2.5)


@pytest.mark.parametrize("slo", [Slo(ttft_s=0.49), Slo(tpot_s=0.09), Slo(e2e_s=2.4), Slo(ttft_s=9.0, tpot_s=9.0, e2e_s=2.4)])
def test_one_missed_bound_misses_the_slo(slo: Slo) -> None:
    assert not meets(KEPT, slo)


@pytest.mark.parametrize("slo", [Slo(), Slo(ttft_s=0.5), Slo(ttft_s=0.5, tpot_s=0.1, e2e_s=2.5)])
def test_a_bound_is_kept_at_its_value_and_none_always_holds(slo: Slo) -> None:
    assert meets(KEPT, slo)


def test_one_token_has_no_tpot_to_miss() -> None:
    assert meets(RequestTiming(arrival_s=0.0, first_token_s=0.1, last_token_s=0.1, output_tokens=1), Slo(tpot_s=0.0))


def test_what_failed_or_never_began_meets_nothing() -> None:
    failed = RequestTiming(arrival_s=0.0, first_token_s=0.1, last_token_s=0.2, output_tokens=2, error="gone")
    silent = RequestTiming(arrival_s=0.0, first_token_s=None, last_token_s=None, output_tokens=0)
    assert not meets(failed, Slo())
    assert not meets(silent, Slo())
    assert (silent.ttft_s, silent.tpot_s, silent.e2e_s) == (None, None, None)


def test_goodput_counts_those_that_met_their_whole_slo() -> None:
    late = RequestTiming(arrival_s=0.0, first_token_s=2.0, last_token_s=3.0, output_tokens=11)
    assert goodput_rps([KEPT, late, KEPT], Slo(ttft_s=1.0, tpot_s=0.1), 4.0) == 0.5
    assert goodput_rps([], Slo(), 4.0) == 0.0
