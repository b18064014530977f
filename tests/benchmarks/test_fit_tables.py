from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.fit_tables import encoded, tables
from benchmarks.profiles import splitwise
from cluster.measured import TABLES, measured_tables
from cluster.step_table import StepTable


def _same(shipped: object, fitted: object) -> bool:
    """Alike but for the last digits, which libraries of linear algebra may round apart."""
    match shipped, fitted:
        case float(), float():
            return shipped == pytest.approx(fitted, rel=1e-4, abs=1e-12)
        case dict(), dict():
            return shipped.keys() == fitted.keys() and all(_same(shipped[key], fitted[key]) for key in shipped)
        case list(), list():
            return len(shipped) == len(fitted) and all(map(_same, shipped, fitted))
    return shipped == fitted


def test_the_shipped_tables_are_what_the_profiles_give(data_dir: Path) -> None:
    fitted: list[StepTable] = tables(data_dir)
    assert [table.fit.source for table in measured_tables()] == [table.fit.source for table in fitted]
    for shipped, again in zip(measured_tables(), fitted, strict=True):
        assert _same(msgspec.to_builtins(shipped), msgspec.to_builtins(again)), shipped.fit


def test_the_file_holds_what_was_encoded() -> None:
    assert encoded(list(measured_tables())) == TABLES.read_bytes()


def test_runs_of_batches_that_did_not_fit_in_memory_are_left_out(data_dir: Path) -> None:
    largest = {(p.device, p.devices): max(s.sequences for m in p.points for s in m.steps) for p in splitwise(data_dir)}
    assert largest["h100", 2] == 32
    assert largest["h100", 4] == 64
