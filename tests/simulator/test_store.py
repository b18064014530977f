"""What was run is known afterwards, whatever ended the run after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import InvalidConfig
from simulator.store import FILE, Store
from tests.simulator.comparing import outcome


def test_outcomes_are_there_when_it_is_opened_again(tmp_path: Path):
    with Store(tmp_path / "new") as store:
        store.add("a", "one", outcome(kept=7))
        assert store.get("b") is None
    with Store(tmp_path / "new") as store:
        assert store.get("a") == outcome(kept=7)


def test_torn_last_line_is_forgotten_and_does_not_spoil_the_next(tmp_path: Path):
    with Store(tmp_path) as store:
        store.add("a", "one", outcome())
        store.add("b", "two", outcome())
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-9])
    with Store(tmp_path) as store:
        assert (store.get("a"), store.get("b")) == (outcome(), None)
        store.add("c", "three", outcome(kept=3))
    with Store(tmp_path) as store:
        assert (store.get("a"), store.get("c")) == (outcome(), outcome(kept=3))


def test_line_that_is_no_outcome_is_named(tmp_path: Path):
    (tmp_path / FILE).write_text("{}\n")
    with pytest.raises(InvalidConfig, match=rf"{FILE}:1: is no outcome"):
        Store(tmp_path)


def test_second_writer_is_refused_while_the_first_one_writes(tmp_path: Path):
    with Store(tmp_path), pytest.raises(InvalidConfig, match="another command"):
        Store(tmp_path)
    Store(tmp_path).__exit__()
