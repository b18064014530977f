"""An operator's word reaches the fleet, with its author and its end, or is refused before it does."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cli import hands
from cli.main import main
from cluster.fleet import Fleet, ModelSpec, NodeSpec, ReplicaGroup
from cluster.replica import Role
from cluster.snapshot import Hold
from tests.cli.fake_answerer import FakeAnswerer

NOW_S = 1_900_000_000.0
FLEET = Fleet(
    name="demo",
    models=(ModelSpec(name="m", path="/m"), ModelSpec(name="big", path="/b")),
    nodes=(NodeSpec(name="node-a"), NodeSpec(name="node-b")),
    replicas=(
        ReplicaGroup(role=Role.PREFILL, model="m", pool="h100"),
        ReplicaGroup(role=Role.DECODE, model="m", pool="h100", max_replicas=4),
        ReplicaGroup(role=Role.DECODE, model="big", pool="l4"),
    ),
)


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAnswerer]:
    monkeypatch.setenv("MOBULA_HOME", str(tmp_path))
    monkeypatch.setattr(hands.time, "time", lambda: NOW_S)
    answers = {"fleet": lambda _: FLEET, "hold": lambda _: None, "unhold": lambda given: "pause" not in given["kinds"]}
    with FakeAnswerer("demo", answers) as fake:
        yield fake


def held(fleet: FakeAnswerer) -> Hold:
    (question,) = (one for one in fleet.asked if one.call == "hold")
    return msgspec.convert(question.arguments["hold"], Hold)


def run(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code


def test_pause_is_in_force_for_an_hour_by_the_user_who_says_so(fleet: FakeAnswerer, capsys):
    assert run("pause") == 0
    assert held(fleet) == Hold(kind="pause", author=getpass.getuser(), expires_s=NOW_S + 3600)
    out = capsys.readouterr().out
    assert out.startswith("scaling is paused, lost replicas are still replaced, until ")
    assert out.endswith(f"(1 h), by {getpass.getuser()}\n")


@pytest.mark.parametrize(("words", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5d", 129_600), ("7d", 604_800)])
def test_durations_are_seconds_from_now(fleet: FakeAnswerer, words: str, seconds: int):
    assert run("pause", "--for", words) == 0
    assert held(fleet).expires_s == NOW_S + seconds


@pytest.mark.parametrize("kind", ["cordon", "drain"])
def test_node_is_held_by_its_name(fleet: FakeAnswerer, capsys, kind: str):
    assert run(kind, "node-b", "--author", "ann", "--for", "2h") == 0
    assert held(fleet) == Hold(kind=kind, target="node-b", author="ann", expires_s=NOW_S + 7200)
    assert "node-b" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "group"), [("big/decode/l4", "big/decode/l4"), ("prefill", "m/prefill/h100")])
def test_pin_takes_a_group_or_a_role_that_only_one_has(fleet: FakeAnswerer, name: str, group: str):
    assert run("pin", name, "1", "--author", "ann") == 0
    assert held(fleet) == Hold(kind="pin", target=group, replicas=1, author="ann", expires_s=NOW_S + 3600)


def test_pin_beyond_the_groups_limits_says_so(fleet: FakeAnswerer, capsys):
    assert run("pin", "m/decode/h100", "9", "--author", "ann") == 0
    assert capsys.readouterr().out.startswith("m/decode/h100 is pinned at 9, outside its limits of 1 to 4, until ")


@pytest.mark.parametrize(
    ("words", "kinds", "target", "said"),
    [
        (("resume",), ["pause"], "", "scaling was not paused"),
        (("uncordon", "node-a"), ["cordon", "drain"], "node-a", "node-a takes replicas again"),
        (("unpin", "prefill"), ["pin"], "m/prefill/h100", "m/prefill/h100 is scaled by the policies again"),
    ],
)
def test_what_is_taken_back_is_said_and_so_is_what_was_not_in_force(fleet, capsys, words, kinds, target, said):
    assert run(*words) == 0
    assert fleet.asked[-1].call == "unhold"
    assert fleet.asked[-1].arguments == {"kinds": kinds, "target": target}
    assert capsys.readouterr().out == f"{said}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("cordon", "node-z"), "node-z is no node of fleet demo; near it are node-"),
        (("drain", "x"), "x is no node of fleet demo; its nodes are node-a, node-b"),
        (("uncordon", "x"), "x is no node of fleet demo"),
        (("pin", "decode", "1"), "2 groups of fleet demo are of role decode: m/decode/h100, big/decode/l4; name one"),
        (("pin", "m/decod/h100", "1"), "m/decod/h100 is no group or role of fleet demo; near it are m/decode/h100"),
        (
            ("pin", "m/decode/h100", "1000000000000000000000"),
            "1000000000000000000000 replicas are above 10000, the most that a fleet",
        ),
        (("unpin", "cache"), "cache is no group or role of fleet demo; its groups are m/prefill/h100, m/decode/h100"),
        (("pause", "--for", "8d"), "--for 8d is not above 0 and at most 7 d"),
        (("pause", "--for", "0s"), "--for 0s is not above 0"),
        (("pause", "--for", "soon"), "--for 'soon' is no duration such as 90s, 30m, 2h or 1d"),
        (("pause", "--author", ""), "--author '' is empty, not printable or above 64 characters"),
        (("pause", "--author", "x" * 65), "above 64 characters"),
        (("pause", "--author", "\x1b[2J"), "not printable"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_held(fleet: FakeAnswerer, capsys, words, said):
    assert run(*words) == 2
    assert said in capsys.readouterr().err
    assert {one.call for one in fleet.asked} <= {"fleet"}


def test_without_a_fleet_there_is_nothing_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("MOBULA_HOME", str(tmp_path))
    assert run("pause") == 2
    assert "no fleet is up" in capsys.readouterr().err
