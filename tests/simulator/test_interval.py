"""Intervals are as wide as Student says."""

from __future__ import annotations

import pytest

from simulator.interval import interval


def test_half_width_is_that_of_the_t_table():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.303 / 3**0.5, rel=1e-3)  # t of two degrees of freedom at 0.975.


def test_one_value_has_no_interval_and_shows_no_sign():
    found = interval([3.0])
    assert found.half_width is None
    assert not found.excludes_zero


def test_sign_is_shown_only_beyond_the_half_width():
    assert interval([1.0, 1.1, 0.9]).excludes_zero
    assert not interval([1.0, -1.0, 0.5]).excludes_zero


def test_nine_of_ten_intervals_and_more_hold_the_mean_of_what_was_drawn():
    from random import Random

    chance = Random(5)
    held = 0
    for _ in range(1000):
        found = interval([chance.gauss(1.0, 2.0) for _ in range(5)])
        assert found.half_width is not None
        held += abs(found.mean - 1.0) <= found.half_width
    assert 925 <= held <= 975
