"""Challengers are set beside the policy that acts, and nobody is told that it is more than it is."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cli import compare as command
from cli.main import main
from cluster.fleet import PipelineSpec, PolicySpec
from controller.comparison import Comparison
from controller.pipelines import build
from tests.controller.scripted import play
from tests.policies.clusters import BUCKET_S, NOW_S

CALM = build(PipelineSpec(policies=(PolicySpec(use="policies.scaling:Scaling", settings={"down_margin": 2.0}),)))
OTHER = """
models: [{name: m, path: /m}]
replicas: [{role: mixed, engine: emulated, pace: {shape: llama-3.1-8b, accelerator: h100}}]
control:
  pipeline:
    policies: [{use: "policies.scaling:Scaling", settings: {down_margin: MARGIN}}]
"""


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("played") / "journal.sqlite"
    play(path, {"calm": CALM}).close()
    return path


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setattr(command.time, "time", lambda: NOW_S + 1000.0)


def run(*words: str | Path) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", *(str(word) for word in words)])
    return ended.value.code


def found(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Comparison:
    assert run(*words, "--json") == 0
    return msgspec.json.decode(capsys.readouterr().out, type=Comparison)


def test_text_has_both_sides_the_first_difference_and_what_it_does_not_say(played: Path, capsys):
    assert run("--journal", played) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert max(map(len, out.splitlines())) <= 90
    assert "not what would have come of following them" in " ".join(lines)
    assert any(line.startswith("m/decode/p ") and "->" in line and "%" in line for line in lines)
    assert any(line.startswith("m/prefill/p differs first in pass ") for line in lines)
    assert any(line.startswith("calm: ") and "since" in line for line in lines)


def test_other_file_decides_like_the_challenger_of_its_settings(played: Path, tmp_path: Path, capsys):
    (tmp_path / "calm.yaml").write_text(OTHER.replace("MARGIN", "2.0"))
    shadow = found(capsys, "--journal", played)
    later = found(capsys, "--journal", played, "--with", tmp_path / "calm.yaml")
    assert {one.challenger for one in later.groups} == {"calm.yaml"}
    assert [(one.group, one.differing, one.first) for one in later.groups] == [
        (one.group, one.differing, one.first) for one in shadow.groups
    ]


def test_since_bounds_both_ways_of_comparing(played: Path, tmp_path: Path, capsys):
    (tmp_path / "calm.yaml").write_text(OTHER.replace("MARGIN", "2.0"))
    since = f"-{1000 - 150 * BUCKET_S:.0f}s"
    assert found(capsys, "--journal", played, "--since", since).passes == 6
    assert found(capsys, "--journal", played, "--since", since, "--with", tmp_path / "calm.yaml").passes == 6
    assert run("--journal", played, "--since", "-1s") == 2
    assert "the journal has no pass since" in capsys.readouterr().err


def test_journal_without_challengers_says_how_to_have_some(tmp_path: Path, capsys):
    play(tmp_path / "j").close()
    assert run("--journal", tmp_path / "j") == 0
    assert "No challenger decided" in capsys.readouterr().out


def test_bad_settings_of_the_other_file_are_refused_with_their_place(played: Path, tmp_path: Path, capsys):
    (tmp_path / "bad.yaml").write_text(OTHER.replace("MARGIN", "lots"))
    assert run("--journal", played, "--with", tmp_path / "bad.yaml") == 2
    assert "bad.yaml: control.pipeline.policies[0].settings" in capsys.readouterr().err
