"""`mobula cheapest` names the fleet, says how it was found, and writes it down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import main
from controller.config import check, load_fleet
from tests.simulator.comparing import BRISK, CLUSTER

pytestmark = pytest.mark.timeout(900)  # Who simulates first waits for the compiler, which takes a minute and more.


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    (tmp_path / "narrow.yaml").write_text("replicas: {m/decode/h100: [0, 0], m/decode/l4: [1, 1]}\n")
    return tmp_path


def run(here: Path, *words: str | Path) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(["cheapest", BRISK, "-f", str(here / "cluster.yaml"), "--warm-up", "0", *(str(word) for word in words)])
    return ended.value.code


def test_fleet_that_is_written_loads_and_has_what_was_told(here: Path, capsys):
    assert run(here, "--attainment", "0.95", "--export", here / "found.yaml", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    fleet = load_fleet(here / "found.yaml")
    check(fleet, files=False)
    assert {f"m/{group.role.value}/{group.pool}": group.count for group in fleet.replicas} == {
        name: count for name, count in told["best"]["replicas"].items() if count
    }
    assert sum(node.price_usd_per_hour for node in fleet.nodes) == pytest.approx(told["best"]["usd_per_hour"])
    assert told["best"]["outcome"]["attainment"] >= 0.95
    assert told["neighbours"]


def test_second_time_nothing_is_simulated(here: Path, monkeypatch, capsys):
    words = ("--attainment", "0.95", "--out", here / "outcomes")
    assert run(here, *words) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr("simulator.case.run", None)
    assert run(here, *words) == 0
    assert capsys.readouterr().out == first
    assert "fleets: formulas exclude" in first


def test_impossible_ask_says_the_best_there_is_and_what_binds(here: Path, capsys):
    assert run(here, "--attainment", "0.999", "--space", here / "narrow.yaml") == 2
    said = capsys.readouterr().err
    assert "none of the 1 fleets in the space keeps the SLO for 0.999 of the requests: the best, 1 x decode/l4" in said
    assert "is bound by T" in said


@pytest.mark.parametrize(
    ("words", "said"), [(["--attainment", "1.5"], "--attainment 1.5 is outside (0, 1)"), (["--space", "no.yaml"], "no.yaml")]
)
def test_what_cannot_be_searched_is_one_line(here: Path, capsys, words: list[str], said: str):
    assert run(here, *words) == 2
    assert said in capsys.readouterr().err
