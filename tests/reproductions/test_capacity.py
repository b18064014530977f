"""The search for the highest rate that keeps a promise."""

from __future__ import annotations

import pytest

from cluster.errors import InvalidConfig
from reproductions.capacity import highest_rate


@pytest.mark.parametrize("limit", [0.013, 1.0, 3.7, 950.0])
def test_it_is_found_to_the_precision_asked_for_and_never_exceeded(limit: float) -> None:
    found = highest_rate(lambda rate: rate <= limit, 4.0, 0.01)
    assert found <= limit <= 1.01 * found


def test_what_no_rate_keeps_has_capacity_0() -> None:
    assert highest_rate(lambda rate: False, 4.0) == 0.0


def test_a_promise_that_bounds_nothing_is_said_so() -> None:
    with pytest.raises(InvalidConfig, match="bounds nothing"):
        highest_rate(lambda rate: True, 4.0)
