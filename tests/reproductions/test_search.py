"""The highest load that passes is found by halving."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reproductions.search import highest_passing

GRID = tuple(range(10, 261, 10))


@given(st.integers(0, 300))
def test_it_is_the_last_of_the_grid_that_passes_and_takes_five_runs_of_twenty_six(edge: int) -> None:
    asked: list[float] = []

    def passes(load: float) -> bool:
        asked.append(load)
        return load <= edge

    assert highest_passing(passes, GRID) == min(edge // 10 * 10, 260)
    assert len(asked) <= 5
