"""How a burst is judged."""

from benchmarks.burst import BIN_S, to_slo_s

GOOD, BAD = [True] * 40, [True] * 30 + [False] * 10


def test_the_slo_is_met_from_the_first_window_after_which_none_is_bad():
    assert to_slo_s([BAD, BAD, GOOD, GOOD]) == 2 * BIN_S


def test_a_relapse_starts_the_count_anew():
    assert to_slo_s([BAD, GOOD, BAD, GOOD]) == 3 * BIN_S


def test_one_stray_miss_in_a_hundred_later_arrivals_is_within_the_promise():
    stray = [True] * 39 + [False]
    assert to_slo_s([BAD, GOOD, stray, GOOD, GOOD]) == BIN_S


def test_a_window_without_arrivals_shows_nothing():
    assert to_slo_s([[], GOOD]) == BIN_S


def test_what_is_never_met_has_no_time():
    assert to_slo_s([GOOD, BAD]) is None
