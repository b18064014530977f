"""No published result is fed back in and called predicted: with other prefill times, predictions move and nothing else does."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from reproductions import walk
from reproductions.row import Row
from reproductions.settings import Settings

Rows = dict[tuple[str, str, str], Row]


@functools.cache
def both(name: str, data_dir: Path) -> tuple[Rows, Rows]:
    """A reproduction's rows with prefill times as they are, and doubled."""
    plain, doubled = (
        {row.name: row for row in walk.found()[name].rows(Settings(data_dir=data_dir, quick=True, prefill_cost=cost))}
        for cost in (1.0, 2.0)
    )
    return plain, doubled


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(walk.found()))
def test_doubled_prefill_cost_moves_every_prediction_that_depends_on_it(name: str, data_dir: Path) -> None:
    plain, doubled = both(name, data_dir)
    assert plain.keys() == doubled.keys()
    depends = [row for row in plain.values() if row.label == "predicted" and row.depends_on_prefill and row.ours is not None]
    assert [row.name for row in depends if doubled[row.name].ours == row.ours] == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(walk.found()))
def test_doubled_prefill_cost_moves_nothing_else(name: str, data_dir: Path) -> None:
    plain, doubled = both(name, data_dir)
    others = [row for row in plain.values() if not row.depends_on_prefill]
    assert [row.name for row in others if doubled[row.name].ours != row.ours] == []
