"""What is believed of the arrivals, and how soon."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.snapshot import Latency
from policies.flow import Window, fallen, index_of_dispersion, missed, risen
from tests.policies.clusters import BUCKET_S, demand, steady, workload

WINDOW = Window()


def test_steady_flow_is_believed_as_it_is():
    flow = risen(steady(4.0, prompt=700.0, output=90.0), WINDOW, ahead_s=60.0)
    assert (flow.rate_rps, flow.prompt_tokens, flow.output_tokens) == pytest.approx((4.0, 700.0, 90.0))
    assert flow.prompt_tokens_sd == pytest.approx(700.0 * math.sqrt(0.5))


def test_big_step_is_believed_after_one_bucket_and_a_small_one_is_not():
    assert risen(workload([2.0] * 59 + [40.0]), WINDOW).rate_rps > 25.0
    assert risen(workload([2.0] * 59 + [2.6]), WINDOW).rate_rps < 2.1


def test_small_step_is_believed_after_three_minutes():
    assert risen(workload([2.0] * 24 + [2.6] * 36), WINDOW).rate_rps == pytest.approx(2.6)


def test_step_is_not_carried_on_as_if_it_were_a_trend():
    for since in range(1, 60):
        assert risen(workload([3.0] * (60 - since) + [12.0] * since), WINDOW, ahead_s=60.0).rate_rps <= 12.0 + 1e-9


def test_sure_trend_is_carried_on_and_noise_is_not():
    ramp = [20.0 + step for step in range(60)]
    ahead = risen(workload(ramp), WINDOW, ahead_s=30.0).rate_rps
    assert 79.0 < risen(workload(ramp), WINDOW).rate_rps + 4.0 < ahead + 3.0
    assert ahead < 79.0 + 0.2 * 30.0
    rng = random.Random(3)
    noisy = workload([rng.gauss(20.0, 2.0) for _ in range(60)])
    assert risen(noisy, WINDOW, ahead_s=30.0).rate_rps < 23.0


def test_fall_is_believed_only_when_no_late_minute_was_busy():
    busy_until = 60 - round((WINDOW.fall_s - 30.0) / BUCKET_S)
    assert fallen(workload([10.0] * busy_until + [1.0] * (60 - busy_until)), WINDOW).rate_rps > 5.0
    assert fallen(workload([10.0] * 12 + [1.0] * 48), WINDOW).rate_rps < 2.0


def test_bursty_arrivals_are_told_from_poisson_and_a_ramp_is_no_burst():
    rng = random.Random(1)
    poisson = [demand(sum(rng.random() < 0.01 for _ in range(1000)) / BUCKET_S) for _ in range(60)]
    bursts = [demand(rng.choice((0.0, 0.0, 0.0, 40.0)) / BUCKET_S) for _ in range(60)]
    ramp = [demand(100.0 + step) for step in range(60)]
    assert index_of_dispersion(poisson) < 1.8
    assert index_of_dispersion(bursts) > 10.0
    assert index_of_dispersion(ramp) == 1.0


def test_nothing_measured_is_no_flow():
    assert risen(workload([]), WINDOW).rate_rps == 0.0
    assert fallen(workload([0.0] * 60), WINDOW).rate_rps == 0.0


rates = st.lists(st.floats(0.0, 500.0), min_size=1, max_size=60)


@given(rates)
def test_rise_never_exceeds_fall_of_the_same_steady_past(past):
    level = max(past)
    assert risen(steady(level), WINDOW).rate_rps <= fallen(steady(level), WINDOW).rate_rps + 1e-9


@given(rates, st.floats(1.0, 10.0))
def test_more_of_the_same_is_never_believed_to_be_less(past, factor):
    more = [rate * factor for rate in past]
    assert fallen(workload(more), WINDOW).rate_rps >= fallen(workload(past), WINDOW).rate_rps - 1e-9


def test_the_slo_counts_as_missed_only_where_that_is_sure_or_nothing_ends():
    def said(attainment: float | None, **more: object) -> bool:
        return missed(steady(5.0, attainment=attainment, **more), WINDOW)

    assert [said(share) for share in (0.8, 0.84, 0.9)] == [True, False, False]  # 300 of a minute: four sigmas below 0.9 are 0.83.
    assert said(None)
    assert not said(None, ttft=Latency(p50_s=1.0, p90_s=1.0, p99_s=1.0))
