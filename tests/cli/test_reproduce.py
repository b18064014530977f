"""`mobula reproduce` prints what it has, however it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import ModuleType

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli.main import app
from cli.reproduce import shown
from cluster.errors import InvalidConfig
from reproductions import walk
from reproductions.row import Row
from reproductions.settings import Settings
from tests.reproductions.test_frame import ROW

RUNNER = CliRunner()


def rocket(settings: Settings) -> Iterator[Row]:
    """A reproduction of two rows."""
    yield ROW
    yield Row(**{name: getattr(ROW, name) for name in ROW.__struct_fields__} | {"claim": "another", "ours": None, "why": "no fuel"})


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("rocket", "A rocket.\n\nMore.")
    module.rows = rocket
    monkeypatch.setattr(walk, "found", lambda package=None: {"rocket": module})
    monkeypatch.setattr("reproductions.settings.found_data", lambda: ".")
    return module


@pytest.mark.usefixtures("found")
def test_list_names_each_with_its_first_line() -> None:
    assert RUNNER.invoke(app, ["reproduce", "--list"]).output == "rocket: A rocket.\n"


@pytest.mark.usefixtures("found")
def test_json_has_every_row_with_its_verdict() -> None:
    rows = json.loads(RUNNER.invoke(app, ["reproduce", "rocket", "--json", "--quick"]).output)["rows"]
    assert [(row["ours"], row["verdict"], row["quick"]) for row in rows] == [
        (1.9, "within", True),
        (None, "not reproducible", True),
    ]


def test_a_run_that_breaks_off_keeps_the_rows_it_has(found: ModuleType) -> None:
    def broken(settings: Settings) -> Iterator[Row]:
        yield ROW
        raise KeyboardInterrupt

    found.rows = broken
    result = RUNNER.invoke(app, ["reproduce", "--all", "--json"])
    assert result.exit_code != 0
    assert len(json.loads(result.stdout.splitlines()[0])["rows"]) == 1


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize("arguments", [[], ["rocket", "--all"]])
def test_names_or_all_are_asked_for(arguments: list[str]) -> None:
    assert isinstance(RUNNER.invoke(app, ["reproduce", *arguments]).exception, InvalidConfig)


def test_the_table_shows_claim_ours_label_and_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=200).print(shown(list(rocket(Settings(data_dir=".")))))
    text = capsys.readouterr().out
    for words in ("2x as fast (abstract)", "1.9 x", "predicted", "within", "10 %", "not reproducible", "no fuel"):
        assert words in text
