"""What an operator reads at three in the morning: whole, true and within the terminal's width."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from cli import explain
from cli.fleet_home import FleetHome
from cli.main import main
from cluster.actions import Decision, Reason, ScaleRole
from cluster.snapshot import Hold
from controller.explanation import Answer
from controller.journal import Entry, Journal
from tests.controller.scripted import LOST_AT
from tests.policies.clusters import BUCKET_S, NOW_S, cluster, group, steady

WIDTH = 90


@pytest.fixture(autouse=True)
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("MOBULA_HOME", str(tmp_path))
    monkeypatch.setattr(explain.time, "time", lambda: NOW_S + 1000.0)


def run(*words: str | Path) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


def lines(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[str]:
    assert run("explain", *words) == 0
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out)) <= WIDTH
    return [" ".join(line.split()) for line in out]


def test_a_rise_is_told_with_reason_numbers_runner_up_actions_and_turning_points(played: Path, capsys):
    told = lines(capsys, "--journal", played, "--pass", "12")
    assert told[0].startswith("Pass 12 at ")
    assert "m/decode/p 1 -> 3 replicas" in told
    assert "why 1 do not carry 62.52 requests/s: saturation" in told
    assert "numbers rate 62.52 requests/s bound rate 17.6 requests/s" in told
    assert "wanted 1 replica low 1 replica" in told
    assert "runner-up 1, as it is" in told
    assert "actions start decode-p-2 on n2: done after 4 s" in told
    assert "would turn demand 11 -> 9.38 requests/s (-15%) gives 2 replicas" in told
    assert "not TTFT SLO, 32 times more or less" in told
    assert "demand and lengths are means over the last 5 min" in told


def test_last_change_is_told_by_default(played: Path, capsys):
    assert lines(capsys, "--journal", played)[0].startswith("Pass 120 ")


def test_quiet_pass_names_the_last_change_before_it(played: Path, capsys):
    told = lines(capsys, "--journal", played, "--pass", "40")
    assert told[-2:] == ["Nothing was done in this pass.", "The last change before it: mobula explain --pass 27"]
    told = lines(capsys, "decode", "--journal", played, "--pass", "40")
    assert told[-2:] == ["Nothing was done about decode in this pass.", "The last change before it: mobula explain --pass 23"]


def test_lost_replica_and_its_dead_node_are_told(played: Path, capsys):
    told = lines(capsys, "--journal", played, "--pass", str(LOST_AT))
    assert "m/prefill/p stays at 7 replicas (6 of 7 were there)" in told
    assert "lost prefill-p-1 on n1, which is dead" in told


def test_what_was_dropped_is_told_with_who_stopped_it(played: Path, capsys):
    told = lines(capsys, "--journal", played, "--pass", "24")
    assert "dropped m/prefill/p to 4: 4 is below 5, one step down from 6 (RateOfChange)" in told


@pytest.mark.parametrize(("subject", "number"), [("decode-p-9", 23), ("m/prefill/p", 120), ("decode", 52), ("decode-p-7", 108)])
def test_subject_is_told_by_the_last_pass_that_touched_it(played: Path, capsys, subject: str, number: int):
    assert lines(capsys, subject, "--journal", played)[0].startswith(f"Pass {number} ")


def test_subject_and_time_are_the_last_touch_until_then(played: Path, capsys):
    ago_s = 1000 - 20 * BUCKET_S
    assert lines(capsys, "decode", "--at", f"-{ago_s:.0f}s", "--journal", played)[0].startswith("Pass 17 ")


def test_time_is_the_pass_in_force_then(played: Path, capsys):
    assert lines(capsys, "--at", f"-{1000 - 14 * BUCKET_S - 3:.0f}s", "--journal", played)[0].startswith("Pass 14 ")


def test_json_is_the_whole_answer(played: Path, capsys):
    assert run("explain", "--journal", played, "--pass", "12", "--json") == 0
    answer = msgspec.json.decode(capsys.readouterr().out, type=Answer)
    assert [one.group for one in answer.groups] == ["m/decode/p", "m/prefill/p"]
    assert all(one.flips and one.actions for one in answer.groups)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--pass", "4711"), "pass 4711 is not in the journal"),
        (("--at", "-1d"), "the journal's first pass"),
        (("--at", "2999-01-01T00:00"), "--at 2999-01-01 00:00:00 is yet to come"),
        (("--at", "soon"), "--at 'soon' is no time"),
        (("--at", "-5m", "--pass", "3"), "--at and --pass name two passes; give one"),
        (("--request", "r", "--pass", "3"), "--request stands alone"),
        (("decoed",), "decoed is no replica, role or group of pass 155; near it are decode"),
    ],
)
def test_what_is_not_there_is_refused_in_a_line(played: Path, capsys, words: tuple[str, ...], said: str):
    assert run("explain", *words, "--journal", played) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def one_pass(path: Path, decision: Decision, mode: str = "act", **more: object) -> Path:
    snapshot = cluster([group(wanted=2)], [steady(5.0)], pass_number=7, **more)
    journal = Journal(path)
    journal.write(Entry(epoch=2, pipeline="{}", mode=mode, snapshot=snapshot, decision=decision))
    journal.close()
    return path


def test_replica_that_no_pass_has_touched_is_told_by_the_latest(tmp_path: Path, capsys):
    told = lines(capsys, "mixed-p-1", "--journal", one_pass(tmp_path / "j", Decision(targets={"m/mixed/p": 2})))
    assert told[0].startswith("Pass 7 ")
    assert "m/mixed/p stays at 2 replicas" in told
    assert told[-1] == "Nothing was done about mixed-p-1 in this pass, nor in any before it."


def test_failed_pass_says_what_raised(tmp_path: Path, capsys):
    told = lines(capsys, "--journal", one_pass(tmp_path / "j", Decision(failed="Scaling: ValueError('x')")))
    assert "This pass did nothing: Scaling: ValueError('x')" in told
    assert not any(line.startswith("would turn") for line in told)


def test_pin_says_until_when_and_that_it_hangs_on_no_number(tmp_path: Path, capsys):
    pin = Hold(kind="pin", target="m/mixed/p", replicas=2, author="ann", expires_s=NOW_S + 60)
    reason = Reason(text="pinned by ann", numbers={"expires_s": pin.expires_s})
    wish = ScaleRole(group="m/mixed/p", replicas=2, reason=reason)
    path = one_pass(tmp_path / "j", Decision(wishes=(wish,), targets={"m/mixed/p": 2}), mode="advise", holds=(pin,))
    told = lines(capsys, "--journal", path)
    assert told[0].endswith("advised only: nothing is carried out")
    assert f"numbers until {explain.clock(pin.expires_s, NOW_S + 1000)}" in told
    assert "would turn no measured number: it does not hang on any" in told


def test_brackets_in_a_reason_are_shown_as_they_are(tmp_path: Path, capsys):
    wish = ScaleRole(group="m/mixed/p", replicas=2, reason=Reason(text="[red]as [it] is[/red]"))
    told = lines(capsys, "--journal", one_pass(tmp_path / "j", Decision(wishes=(wish,), targets={"m/mixed/p": 2})))
    assert "why [red]as [it] is[/red]" in told


def test_journal_of_a_fleet_that_is_down_is_found(played: Path, capsys):
    home = FleetHome("demo")
    home.make()
    shutil.copy(played, home.journal_path)
    assert lines(capsys)[0].startswith("Pass 120 ")
    FleetHome("other").make()
    shutil.copy(played, FleetHome("other").journal_path)
    assert run("explain") == 2
    assert "2 fleets have left one: demo, other; choose with --fleet" in capsys.readouterr().err
    assert lines(capsys, "--fleet", "demo")[0].startswith("Pass 120 ")


@pytest.mark.parametrize("words", [(), ("--fleet", "demo"), ("--journal", "/nowhere/journal")])
def test_without_a_journal_one_is_told_where_it_was_looked_for(tmp_path: Path, capsys, words: tuple[str, ...]):
    assert run("explain", *words) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error or "/nowhere/journal" in error


def test_empty_journal_is_said_to_be_empty(tmp_path: Path, capsys):
    Journal(tmp_path / "j").close()
    assert run("explain", "--journal", tmp_path / "j") == 2
    assert "the journal is empty" in capsys.readouterr().err
