"""Claims about `mobula config`, beside a fleet that is up or is not."""

import json
from pathlib import Path

import msgspec
import pytest
import yaml

from cli import config
from cli.main import main
from cluster.errors import Unreachable
from cluster.fleet import Fleet
from controller.config import effective, load_fleet
from policies.flow import Window
from tests.conftest import ROOT

LOCAL = ROOT / "deploy/local.yaml"


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MOBULA_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The example at a port that no other test has, and with a tokenizer in its model's place."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer.json").write_text("{}")
    path = tmp_path / "cluster.yaml"
    path.write_text(LOCAL.read_text().replace("port: 8000", "port: 28417").replace("../.mobula/tiny-dense", "model"))
    return path


@pytest.fixture
def running(file: Path, monkeypatch) -> list[dict]:
    """A fleet that was started with the file as it was; the fleets that it was asked to take over."""
    in_force, asked = msgspec.json.encode(load_fleet(file)), []

    def ask(home, call, kind, **arguments):
        if home.path.name != "local":
            raise Unreachable(f"fleet {home.path.name} is not up")
        if call == "fleet":
            return msgspec.json.decode(in_force, type=kind)
        assert call == "reload"
        asked.append(msgspec.convert(json.loads(msgspec.json.encode(arguments["fleet"])), Fleet))
        return ["replicas[3].max_replicas"]

    monkeypatch.setattr(config, "ask", ask)
    return asked


def edit(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))


def run(capsys, *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["config", *map(str, args)])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_the_example_is_possible_and_is_summed_up(file: Path, capsys):
    code, out, err = run(capsys, "check", "-f", file)
    words = " ".join(out.split())
    assert (code, err) == (0, "")
    assert "tiny-dense/decode/a100-spot emulated llama-3.1-8b on a100-80g 1 0 4" in words
    assert "a100-spot 2 x a100-80g spot a, b 4 0 4 4.80" in words
    assert "decides: Hands (emergency), Disaggregation, Scaling; guarded by Paused, StaleTelemetry" in words
    assert "careful: Hands (emergency), Scaling; guarded by" in words
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert words.endswith("all is possible")


def test_what_cannot_be_is_one_line_and_an_exit_code(file: Path, capsys):
    edit(file, "min_replicas: 0", "min_replicas: 5")
    code, out, err = run(capsys, "check", "-f", file)
    assert (code, out) == (2, "")
    assert err == f"mobula: error: {file}: replicas[2].min_replicas 5 is above 4, its max_replicas\n"


def test_keys_that_cannot_be_read_are_refused_by_check_as_by_up(file: Path, capsys):
    (file.parent / "keys").write_text("no keys")
    edit(file, "allow_anonymous: true", "keys_file: keys")
    code, _, err = run(capsys, "check", "-f", file)
    assert code == 2
    assert "keys" in err


def test_show_prints_yaml_with_the_defaults_of_policies(file: Path, capsys):
    code, out, _ = run(capsys, "show", "-f", file)
    assert code == 0
    scaling = yaml.safe_load(out)["control"]["pipeline"]["policies"][2]
    window = {"rise_s": [5.0, 15.0, 60.0, 180.0], "fall_s": 120.0, "fall_part_s": 60.0}
    assert scaling["settings"]["window"] == {**msgspec.to_builtins(Window()), **window}
    assert scaling["settings"]["settle_s"] == 30.0


def test_show_as_json_is_the_fleet(file: Path, capsys):
    _, out, _ = run(capsys, "show", "-f", file, "--json")
    assert msgspec.json.decode(out, type=Fleet) == effective(load_fleet(file))


def test_show_of_a_running_fleet_is_what_it_runs_with(file: Path, running, capsys):
    edit(file, "max_replicas: 2", "max_replicas: 1")
    _, out, _ = run(capsys, "show", "--fleet", "local", "--json")
    assert msgspec.json.decode(out, type=Fleet).replicas[3].max_replicas == 2


@pytest.mark.parametrize("args", [[], ["-f", "cluster.yaml", "--fleet", "local"]])
def test_show_is_of_one_config(args: list[str], capsys):
    code, _, err = run(capsys, "show", *args)
    assert (code, err) == (2, "mobula: error: give --file or --fleet, one of them: whose config is to be shown\n")


def test_diff_tells_what_can_change_while_the_fleet_runs(file: Path, running, capsys):
    edit(file, "max_replicas: 2", "max_replicas: 1")
    edit(file, "port: 28417", "port: 28418")
    code, out, _ = run(capsys, "diff", "-f", file)
    words = " ".join(out.split())
    assert code == 0
    assert "replicas[3].max_replicas tiny-dense/mixed/l4 2 1 yes" in words
    assert "gateway.port 28417 28418 no" in words
    assert "1 of 2 need `mobula down` and `mobula up`" in words
    _, out, _ = run(capsys, "diff", "-f", file, "--json")
    assert json.loads(out)[0] == {
        "path": "replicas[3].max_replicas", "of": "tiny-dense/mixed/l4", "old": 2, "new": 1, "live": True
    }  # fmt: skip


def test_diff_of_the_same_says_so(file: Path, running, capsys):
    assert run(capsys, "diff", "-f", file)[1] == f"{file} is what fleet local runs with\n"


def test_a_fleet_that_is_not_up_is_named(file: Path, running, capsys):
    assert run(capsys, "diff", "-f", file, "--fleet", "other") == (75, "", "mobula: error: fleet other is not up\n")


def test_reload_hands_the_whole_file_over(file: Path, running, capsys):
    edit(file, "max_replicas: 2", "max_replicas: 1")
    code, out, _ = run(capsys, "reload", "-f", file)
    assert code == 0
    assert out.endswith("fleet local has changed 1 setting\n")
    assert running == [load_fleet(file)]


def test_reload_of_the_same_asks_for_nothing(file: Path, running, capsys):
    code, out, _ = run(capsys, "reload", "-f", file)
    assert (code, out, running) == (0, f"{file} is what fleet local runs with\n", [])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("max_replicas: 2", "max_replicas: -2", "replicas[3].min_replicas 0 is above -2, its max_replicas"),
        ("max_replicas: 2", "max_replica: 2", "unknown key `replicas[3].max_replica`; did you mean max_replicas"),
        ("port: 28417", "port: 28418", "gateway.port: 28417 to 28418 cannot be while the fleet runs"),
    ],
    ids=["what cannot be", "what is misspelt", "what cannot change"],
)
def test_a_bad_reload_changes_nothing_and_says_so(file: Path, running, capsys, old: str, new: str, words: str):
    edit(file, old, new)
    code, _, err = run(capsys, "reload", "-f", file)
    assert (code, running) == (2, [])
    assert words in err
    assert err.endswith(("; fleet local is as it was\n", "; the fleet is as it was\n"))
