"""`mobula sweep` runs what was not run, on Ray or here, and shows what is known."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cli.main import main
from tests.simulator.comparing import CLUSTER, SHORT

pytestmark = pytest.mark.timeout(900)  # Who simulates first waits for the compiler, which takes a minute and more.

ROOT = Path(__file__).parents[2]
SWEEP = """
workload: {trace: "TRACE"}
fleet: cluster.yaml
seeds: SEEDS
warm_up_s: 0
variants:
  as it is: {}
  two more: {"fleet.replicas[1].count": 3}
"""


def write(directory: Path, seeds: int, trace: str = SHORT) -> Path:
    (directory / "cluster.yaml").write_text(CLUSTER)
    (directory / "sweep.yaml").write_text(SWEEP.replace("SEEDS", str(seeds)).replace("TRACE", trace))
    return directory / "sweep.yaml"


def run(*words: str | Path) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(["sweep", *(str(word) for word in words)])
    return ended.value.code


def test_each_variant_has_a_row_and_fits_the_terminal(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "90")
    assert run(write(tmp_path, 1)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 90
    assert [line.split()[-8] for line in lines if line.strip().startswith(("as it is", "two more"))] == ["1/1", "1/1"]


def test_second_time_nothing_is_run_and_the_same_is_shown(tmp_path: Path, monkeypatch, capsys):
    assert run(write(tmp_path, 1), "--json") == 0
    first = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("simulator.runs.run", None)
    assert run(tmp_path / "sweep.yaml", "--json") == 0
    assert json.loads(capsys.readouterr().out) == first


def test_trace_and_fleets_may_stand_on_the_command_line(tmp_path: Path, capsys):
    write(tmp_path, 1)
    (tmp_path / "free.yaml").write_text(CLUSTER.replace("price_usd_per_hour: 7.0", "price_usd_per_hour: 0"))
    words = (SHORT, tmp_path / "cluster.yaml", tmp_path / "free.yaml", "--seeds", "1", "--warm-up", "0")
    assert run(*words, "--json") == 0
    told = {one["variant"]: one["metrics"] for one in json.loads(capsys.readouterr().out)["variants"]}
    assert told["free"]["attainment"] == told["cluster"]["attainment"]
    assert told["free"]["usd_per_million_output_tokens"]["mean"] < told["cluster"]["usd_per_million_output_tokens"]["mean"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seeds: 0", "sweep.yaml: seeds 0"),
        ("warm_up_s: 900", "warm-up 900 s: no request arrives after it"),
        ('workload: {trace: "gone.csv"}', "gone.csv"),
    ],
)
def test_what_cannot_be_run_is_one_line(tmp_path: Path, capsys, change: str, said: str):
    key = change.partition(":")[0]
    text = write(tmp_path, 1).read_text()
    (tmp_path / "sweep.yaml").write_text("\n".join(change if line.startswith(key) else line for line in text.splitlines()))
    assert run(tmp_path / "sweep.yaml") in (1, 2)
    assert said in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_killed_sweep_goes_on_where_it_was_and_leaves_nothing_running(tmp_path: Path):
    """On a local Ray: four runs of some seconds each, killed once one is known."""
    path = write(tmp_path, 2, "poisson:rate=6,minutes=2,prompt=fixed(300),output=fixed(60)")
    command = [sys.executable, "-m", "cli.main", "sweep", str(path), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kept = tmp_path / "sweep.outcomes/outcomes.jsonl"
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while first.poll() is None and not (kept.exists() and kept.read_bytes().count(b"\n")):
        time.sleep(0.05)
    below = psutil.Process(first.pid).children(recursive=True) if first.poll() is None else []
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) in (0, 130)
    assert [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []
    known = kept.read_bytes().splitlines()
    assert known
    second = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
    assert kept.read_bytes().splitlines()[: len(known)] == known
    assert [len(runs) for runs in json.loads(second.stdout)["runs"].values()] == [2, 2]
    assert (f"{len(known)} of them known" in second.stderr) == (len(known) > 0)
