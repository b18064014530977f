from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.least_squares import non_negative


def _error(features: np.ndarray, coefficients: np.ndarray, seconds: np.ndarray) -> float:
    return float(np.sum((features @ coefficients / seconds - 1) ** 2))


def test_coefficients_that_made_the_measurements_are_found() -> None:
    features = np.array([[1, place, place**2] for place in range(1, 9)], float)
    assert non_negative(features, features @ [3.0, 0.0, 0.5]) == pytest.approx([3.0, 0.0, 0.5], abs=1e-9)


@given(st.integers(0, 2**32 - 1))
def test_no_choice_of_columns_is_nearer(seed: int) -> None:
    chance = np.random.default_rng(seed)
    features, seconds = chance.uniform(-1, 1, (8, 4)), chance.uniform(0.5, 2, 8)
    found = np.array(non_negative(features, seconds))
    assert found.min() >= 0.0
    for chosen in itertools.product([False, True], repeat=4):
        columns = np.flatnonzero(chosen)
        other = np.zeros(4)
        other[columns] = np.linalg.lstsq(features[:, columns] / seconds[:, None], np.ones(8), rcond=None)[0]
        if other.min() >= 0.0:
            assert _error(features, found, seconds) <= _error(features, other, seconds) + 1e-7
