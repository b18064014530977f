"""Numbers as people read them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.figures import figure


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0"), (0.03021, "0.03021"), (1.0, "1"), (93.0449, "93.04"), (12345.6, "12,350"), (1000, "1,000"), (-2.5, "-2.5")],
)
def test_four_digits_say_enough(value: float, said: str):
    assert figure(value) == said


@given(st.floats(1e-3, 1e7))
def test_fifteen_digits_say_all_that_was_stated(value: float):
    stated = float(f"{value:.6g}")
    assert float(figure(stated, 15).replace(",", "")) == stated
