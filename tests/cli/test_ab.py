"""`mobula ab` says which policies are better in what, and writes them down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import main
from controller.config import load_fleet
from controller.pipelines import build
from tests.simulator.comparing import CLUSTER, SHORT

pytestmark = pytest.mark.timeout(900)  # Who simulates first waits for the compiler, which takes a minute and more.


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    """A directory with two fleets, in which runs are done in this process."""
    monkeypatch.setattr("cli.cases.FEW", 100)
    monkeypatch.setenv("COLUMNS", "90")
    (tmp_path / "a.yaml").write_text(CLUSTER)
    three = CLUSTER.replace(
        "count: 1\n    min_replicas: 0\n    max_replicas: 3", "count: 3\n    min_replicas: 3\n    max_replicas: 3"
    )
    (tmp_path / "b.yaml").write_text(three)
    return tmp_path


def run(*words: str | Path) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(["ab", SHORT, *(str(word) for word in words), "--seeds", "2", "--warm-up", "0"])
    return ended.value.code


def test_side_that_takes_more_energy_loses_and_the_winner_is_a_config_that_loads(here: Path, capsys):
    assert run(here / "a.yaml", here / "b.yaml", "--export", here / "winner.yaml", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["winner"], told["by"], told["pairs"]) == ("A", "kwh", 2)
    assert "A is better in energy by" in told["verdict"]
    winner, given = load_fleet(here / "winner.yaml"), load_fleet(here / "a.yaml")
    assert build(winner.control.pipeline) == build(given.control.pipeline)
    assert winner.replicas == given.replicas


def test_text_says_what_else_differs_and_fits_the_terminal(here: Path, capsys):
    assert run(here / "a.yaml", here / "b.yaml") == 0
    told = capsys.readouterr()
    assert max(map(len, told.out.splitlines())) <= 90
    assert "A and B differ in replicas, too" in told.err
    assert "The winner is A, by energy." in told.out


def test_challenger_of_the_same_effect_does_not_win(here: Path, capsys):
    assert run(here / "a.yaml", "--challenger", "calm") == 0
    assert "No winner" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.yaml"], "give B.yaml or --challenger"),
        (["a.yaml", "b.yaml", "--challenger", "calm"], "give B.yaml or --challenger"),
        (["a.yaml", "--challenger", "clam"], "there are: calm"),
        (["a.yaml", "c.yaml"], "c.yaml: cannot be read"),
        (["a.yaml", "b.yaml", "--export", "gone/winner.yaml"], "--export gone/winner.yaml: there is no directory"),
    ],
)
def test_what_cannot_be_compared_is_one_line(here: Path, monkeypatch, capsys, words: list[str], said: str):
    monkeypatch.chdir(here)
    assert run(*words) == 2
    assert said in capsys.readouterr().err
