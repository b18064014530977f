"""What raw samples say."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.metrics import (
    ARRIVALS,
    ARRIVED_TOKENS,
    ARRIVED_TOKENS_SQUARED,
    CACHED_TOKENS,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    REQUESTS,
)
from cluster.snapshot import Demand
from controller.observe.counters import Series, covered_until_s, demand, latency, risen, share_within


def series(*samples: tuple[float, float]) -> Series:
    return Series(name="x", times_s=tuple(time for time, _ in samples), values=tuple(value for _, value in samples))


def edges(*times: float) -> np.ndarray:
    return np.array(times)


def test_rise_between_samples_is_even():
    assert risen([series((0, 0), (10, 100))], edges(0, 1, 5, 10)).tolist() == [10.0, 40.0, 50.0]


def test_rise_is_told_of_any_part_of_what_is_known():
    known = [series((0, 0), (10, 100), (20, 100), (30, 400), (40, 400))]
    assert risen(known, edges(12, 25)).tolist() == [150.0]
    assert risen(known, edges(5, 10, 35)).tolist() == [50.0, 300.0]
    assert risen(known, edges(50, 60)).tolist() == [0.0]


def test_counter_that_falls_has_begun_anew():
    assert risen([series((0, 50), (10, 60), (20, 5), (30, 8))], edges(0, 30)).tolist() == [18.0]


def test_before_the_first_and_after_the_last_sample_nothing_is_known():
    assert risen([series((10, 5), (20, 15))], edges(0, 10, 20, 30)).tolist() == [0.0, 10.0, 0.0]
    assert risen([series((10, 5))], edges(0, 30)).tolist() == [0.0]


def test_gateways_add_up_and_one_that_ended_makes_nothing_stale():
    live, ended = series((0, 0), (100, 100)), series((0, 0), (50, 500))
    assert covered_until_s([live, ended]) == 100
    assert covered_until_s([live, series((0, 0), (99, 1))]) == 99
    assert covered_until_s([]) == -math.inf
    assert risen([live, ended], edges(0, 50, 100)).tolist() == [550.0, 50.0]


def telemetry(**samples: list[tuple[float, float]]) -> dict[str, list[Series]]:
    return {name: [series(*samples[key])] for key, name in NAMES.items() if key in samples}


NAMES = {
    "arrivals": ARRIVALS,
    "tokens": ARRIVED_TOKENS,
    "squares": ARRIVED_TOKENS_SQUARED,
    "prompts": PROMPT_TOKENS,
    "cached": CACHED_TOKENS,
    "outputs": OUTPUT_TOKENS,
    "ended": REQUESTS,
}


def test_cached_part_of_prompts_is_told_apart():
    (bucket,) = demand(
        telemetry(
            arrivals=[(0, 0), (5, 10)],
            tokens=[(0, 0), (5, 1000)],
            squares=[(0, 0), (5, 200_000)],
            prompts=[(0, 0), (5, 800)],
            cached=[(0, 0), (5, 200)],
            ended=[(0, 0), (5, 8)],
            outputs=[(0, 0), (5, 320)],
        ),
        edges(0, 5),
    )
    assert (bucket.requests, bucket.prompt_tokens, bucket.cached_tokens, bucket.output_tokens) == (10.0, 750.0, 250.0, 400.0)
    assert bucket.prompt_tokens_squared == 112_500.0


def turned(rate_rps: float, seconds: int, before: float, after: float) -> list[Demand]:
    """Buckets of a second each, from requests that end as they come; halfway their answers' length changes."""
    times = range(2 * seconds + 1)
    known = telemetry(
        arrivals=[(time, rate_rps * time) for time in times],
        ended=[(time, rate_rps * time) for time in times],
        outputs=[(time, rate_rps * (before * min(time, seconds) + after * max(0, time - seconds))) for time in times],
    )
    return list(demand(known, np.arange(2.0 * seconds + 1)))


def test_new_length_of_answers_is_known_after_a_hundred_of_them_and_the_old_one_is_kept_for_the_past():
    tokens = [bucket.output_tokens / bucket.requests for bucket in turned(10.0, 30, 40.0, 5.0)]
    assert set(tokens[:30]) == {40.0}
    assert tokens[30:40] == sorted(tokens[30:40], reverse=True)
    assert set(tokens[39:]) == {5.0}


def test_fewer_than_a_hundred_answers_tell_of_all_that_arrived():
    tokens = {round(bucket.output_tokens / bucket.requests, 6) for bucket in turned(1.0, 30, 40.0, 5.0)}
    assert tokens == {22.5}


@given(st.floats(0.1, 50.0), st.integers(1, 90), st.floats(1.0, 500.0), st.floats(1.0, 500.0))
def test_expected_answers_are_never_outside_those_that_ended(rate_rps, seconds, before, after):
    for bucket in turned(rate_rps, seconds, before, after):
        low, high = (rate_rps * tokens for tokens in sorted((before, after)))
        assert low - 0.06 <= bucket.output_tokens <= high + 0.06


BOUNDS = (0.01, 0.1, 1.0, 10.0, math.inf)


def histogram(values: list[float]) -> dict[float, list[Series]]:
    return {bound: [series((0, 0), (60, sum(value <= bound for value in values)))] for bound in BOUNDS}


def test_quantiles_lie_evenly_in_their_bucket():
    found = latency(histogram([0.05] * 50 + [0.5] * 50), 0, 60)
    assert (found.p50_s, found.p90_s) == pytest.approx((0.1, 0.1 + 0.9 * 0.8))
    assert latency(histogram([]), 0, 60) is None
    assert latency(histogram([99.0]), 0, 60).p50_s == 10.0


@given(st.lists(st.floats(0.0, 9.0), min_size=1, max_size=60))
def test_quantiles_are_in_the_bucket_of_the_true_one(values):
    found = latency(histogram(values), 0, 60)
    assert found.p50_s <= found.p90_s <= found.p99_s
    true = sorted(values)[math.ceil(0.9 * len(values)) - 1]
    upper = next(bound for bound in BOUNDS if true <= bound)
    assert found.p90_s <= upper


def test_share_within_a_bound():
    values = histogram([0.05] * 30 + [5.0] * 70)
    assert share_within(values, 0.1, 0, 60) == 0.3
    assert share_within(values, 10.0, 0, 60) == 1.0
    assert share_within(histogram([]), 1.0, 0, 60) is None


@given(st.integers(0, 10_000))
def test_buckets_sum_to_the_whole_whatever_the_edges(seed):
    rng = random.Random(seed)
    value, samples = 0.0, []
    for time in range(0, 60, rng.randint(1, 5)):
        value = 0.0 if rng.random() < 0.1 else value + rng.randint(0, 9)
        samples.append((float(time), value))
    cuts = sorted({0.0, 60.0, *(rng.uniform(0, 60) for _ in range(5))})
    assert risen([series(*samples)], np.array(cuts)).sum() == pytest.approx(risen([series(*samples)], edges(0, 60)).sum())
