"""What an operator reads at three in the morning: whole, true and within the terminal's width."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from cli import explain
from cli.figures import figure
from cli.fleet_home import FleetHome
from cli.main import main
from cluster.actions import ChangeRole, Decision, DrainReplica, Reason, ScaleRole
from cluster.snapshot import Hold
from controller import explanation
from controller.explanation import Answer
from controller.journal import Entry, Journal, groups_of
from policies.counterfactual import Flip, replicas
from tests.controller.scripted import LOST_AT, LOST_NODE
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


def wide(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> list[str]:
    """Told where no line is broken, and found to be the same, to a letter, within the width."""
    broken = lines(capsys, *words)
    monkeypatch.setenv("COLUMNS", "1000")
    assert run("explain", *words) == 0
    told = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert letters(told) == letters(broken)
    return told


def letters(told: list[str]) -> Counter[str]:
    return Counter("".join(told).replace(" ", ""))


def part(told: list[str], group: str) -> list[str]:
    """What is told of one group, its title first."""
    start = next(index for index, line in enumerate(told) if line.startswith(f"{group} "))
    return told[start : [*told, ""].index("", start)]


@pytest.fixture(scope="module")
def passes(played: Path) -> list[Entry]:
    return list(Journal(played, read_only=True).entries())


def touching(passes: list[Entry], subject: str | None = None) -> list[int]:
    """Numbers of the passes that did something, or something about a group, a role or a replica."""
    found = []
    for entry in passes:
        for action in entry.decision.actions:
            groups = groups_of(entry.snapshot, action)
            roles = [entry.snapshot.group_by_name[name].role.value for name in groups]
            if subject is None or subject in (*groups, *roles, *action.claims):
                found.append(entry.number)
    return sorted(set(found))


def last(numbers: list[int], until: int) -> int:
    return max((number for number in numbers if number <= until), default=-1)


def first_rise(passes: list[Entry], group: str = "m/decode/p") -> Entry:
    return next(one for one in passes if one.decision.targets[group] > one.snapshot.group_by_name[group].wanted)


def quiet_after_another(passes: list[Entry], subject: str) -> int:
    """The first pass without an action whose last change was not the subject's, which is touched before it and again after it."""
    changes, touches = touching(passes), touching(passes, subject)
    return next(
        one.number
        for one in passes
        if one.number not in changes
        and touches[0] < one.number < touches[-1]
        and last(touches, one.number) < last(changes, one.number)
    )


def test_a_rise_is_told_with_reason_numbers_runner_up_actions_and_turning_points(
    played: Path, passes: list[Entry], capsys, monkeypatch
):
    number = first_rise(passes).number
    told = wide(capsys, monkeypatch, "--journal", played, "--pass", str(number))
    assert told[0].startswith(f"Pass {number} at ")
    answer = explanation.explain(Journal(played, read_only=True), number)
    rise = next(one for one in answer.groups if one.group == "m/decode/p")
    assert all((rise.numbers, rise.runner_up, rise.actions, rise.flips))
    decode = part(told, rise.group)
    assert decode[0] == f"{rise.group} {rise.before} -> {rise.after} replicas"
    assert f"why {rise.why}" in decode
    numbers = " ".join(decode[decode.index(f"why {rise.why}") + 1 : decode.index(f"runner-up {rise.runner_up}")])
    assert numbers == " ".join(["numbers", *(" ".join(explain.quantity(*one, NOW_S)) for one in rise.numbers.items())])
    did = decode.index(f"runner-up {rise.runner_up}") + 1
    steps = [f"{one.action}: done after 4 s" for one in rise.actions]
    assert decode[did : did + len(steps)] == [f"actions {steps[0]}", *steps[1:]]
    turns = [line.removeprefix("would turn ") for line in decode[did + len(steps) :]]
    assert len(turns) == len(rise.flips) + bool(rise.unturned) + 1
    for line, flip in zip(turns, rise.flips, strict=False):
        assert line.startswith(flip.lever.partition(" of ")[0])
        assert f"-> {figure(flip.turns_at, 15)} {flip.unit} (" in line
        assert line.endswith(f"%) gives {flip.outcome}")
    unturned = " ".join(line for line in turns if line.startswith("not "))
    assert all(lever.partition(" of ")[0] in unturned for lever in rise.unturned)
    assert turns[-1] == "demand and lengths are means over the last 5 min"


def test_last_change_is_told_by_default(played: Path, passes: list[Entry], capsys):
    assert lines(capsys, "--journal", played)[0].startswith(f"Pass {touching(passes)[-1]} ")


def test_quiet_pass_names_the_last_change_before_it(played: Path, passes: list[Entry], capsys):
    number = quiet_after_another(passes, "decode")
    before, of_decode = last(touching(passes), number), last(touching(passes, "decode"), number)
    told = lines(capsys, "--journal", played, "--pass", str(number))
    assert told[-2:] == ["Nothing was done in this pass.", f"The last change before it: mobula explain --pass {before}"]
    told = lines(capsys, "decode", "--journal", played, "--pass", str(number))
    assert told[-2:] == [
        "Nothing was done about decode in this pass.",
        f"The last change before it: mobula explain --pass {of_decode}",
    ]


def test_lost_replica_and_its_dead_node_are_told(played: Path, passes: list[Entry], capsys, monkeypatch):
    told = wide(capsys, monkeypatch, "--journal", played, "--pass", str(LOST_AT))
    snapshot = passes[LOST_AT].snapshot
    lost = [one for one in snapshot.replicas if one.node == LOST_NODE]
    name = lost[0].group
    wanted, there = snapshot.group_by_name[name].wanted, sum(one.present for one in snapshot.replicas_by_group[name])
    assert there < wanted
    assert part(told, name)[0] == f"{name} stays at {replicas(wanted)} ({there} of {wanted} were there)"
    gone = ", ".join(f"{one.replica_id} on {LOST_NODE}, which does not answer" for one in lost if one.group == name)
    assert f"lost {gone}" in part(told, name)


def test_what_was_dropped_is_told_with_who_stopped_it(played: Path, passes: list[Entry], capsys, monkeypatch):
    entry, one = next((entry, one) for entry in passes for one in entry.decision.dropped if one.by == "RateOfChange")
    told = wide(capsys, monkeypatch, "--journal", played, "--pass", str(entry.number))
    dropped = part(told, groups_of(entry.snapshot, one.action)[0])
    assert sum(line.startswith("dropped ") for line in dropped) == 1
    stopped = [line.removeprefix("dropped ") for line in dropped].index(f"{one.action.words}: {one.why} (RateOfChange)")
    assert dropped[stopped + 1] == f"proposed because {one.action.reason.text}"


@pytest.mark.parametrize("subject", ["one that was drained", "m/prefill/p", "decode", "one that changed its role"])
def test_subject_is_told_by_the_last_pass_that_touched_it(played: Path, passes: list[Entry], capsys, subject: str):
    kinds = {"one that was drained": DrainReplica, "one that changed its role": ChangeRole}
    if subject in kinds:
        actions = [action for entry in passes for action in entry.decision.actions]
        subject = next(one.replica_id for one in actions if isinstance(one, kinds[subject]))
    touches = touching(passes, subject)
    assert len(touches) > 1
    assert lines(capsys, subject, "--journal", played)[0].startswith(f"Pass {touches[-1]} ")


def test_subject_and_time_are_the_last_touch_until_then(played: Path, passes: list[Entry], capsys):
    number = quiet_after_another(passes, "decode")
    touched = last(touching(passes, "decode"), number)
    ago_s = 1000 - number * BUCKET_S
    assert lines(capsys, "decode", "--at", f"-{ago_s:.0f}s", "--journal", played)[0].startswith(f"Pass {touched} ")


def test_time_is_the_pass_in_force_then(played: Path, capsys):
    assert lines(capsys, "--at", f"-{1000 - 14 * BUCKET_S - 3:.0f}s", "--journal", played)[0].startswith("Pass 14 ")


def test_json_is_the_whole_answer(played: Path, passes: list[Entry], capsys):
    rise = first_rise(passes)
    assert run("explain", "--journal", played, "--pass", str(rise.number), "--json") == 0
    answer = msgspec.json.decode(capsys.readouterr().out, type=Answer)
    touched = {name for action in rise.decision.actions for name in groups_of(rise.snapshot, action)}
    assert {one.group for one in answer.groups if one.actions} == touched
    assert all(one.flips for one in answer.groups)
    assert answer == explanation.explain(Journal(played, read_only=True), rise.number)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--pass", "4711"), "pass 4711 is not in the journal"),
        (("--at", "-1d"), "the journal's first pass"),
        (("--at", "2999-01-01T00:00"), "--at 2999-01-01 00:00:00 is yet to come"),
        (("--at", "soon"), "--at 'soon' is no time"),
        (("--at", "-5m", "--pass", "3"), "--at and --pass name two passes; give one"),
        (("--request", "r", "--pass", "3"), "--request stands alone"),
        (("decoed",), "decoed is no replica, role, group or node of pass 155; near it are decode"),
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


def test_figures_are_told_with_their_units_and_shares(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    numbers = {"rate_rps": 62.5249, "prompt_tokens": 12345.0, "change_s": 6.1, "wanted": 1.0, "low": 2.0}
    reason = Reason(text="because", numbers=numbers)
    wish = ScaleRole(group="m/mixed/p", replicas=3, reason=reason)
    path = one_pass(tmp_path / "j", Decision(wishes=(wish,), targets={"m/mixed/p": 3}))
    flips = (
        Flip(lever="demand of m", unit="requests/s", was=11.0, turns_at=9.38, outcome="2 replicas"),
        Flip(lever="start-up of m/decode/p", unit="s", was=20.0, turns_at=20.1, outcome="2 replicas"),
    )
    answer = explanation.explain(Journal(path, read_only=True), 7)
    mixed = msgspec.structs.replace(answer.groups[0], flips=flips, unturned=("TTFT SLO of m",))
    stated = msgspec.structs.replace(answer, groups=(mixed,))
    monkeypatch.setattr(explanation, "explain", lambda *_, **__: stated)
    told = lines(capsys, "--journal", path)
    assert "numbers rate 62.52 requests/s prompt 12,340 tokens" in told
    assert "change 6.1 s wanted 1 replica" in told
    assert "low 2 replicas" in told
    assert "would turn demand 11 -> 9.38 requests/s (-15%) gives 2 replicas" in told
    assert "start-up of m/decode/p 20 -> 20.1 s (+0.50%) gives 2 replicas" in told
    assert "not TTFT SLO, 32 times more or less" in told


def test_journal_of_a_fleet_that_is_down_is_found(played: Path, passes: list[Entry], capsys):
    latest = f"Pass {touching(passes)[-1]} "
    home = FleetHome("demo")
    home.make()
    shutil.copy(played, home.journal_path)
    assert lines(capsys)[0].startswith(latest)
    FleetHome("other").make()
    shutil.copy(played, FleetHome("other").journal_path)
    assert run("explain") == 2
    assert "2 fleets have left one: demo, other; choose with --fleet" in capsys.readouterr().err
    assert lines(capsys, "--fleet", "demo")[0].startswith(latest)


@pytest.mark.parametrize("words", [(), ("--fleet", "demo"), ("--journal", "/nowhere/journal")])
def test_without_a_journal_one_is_told_where_it_was_looked_for(tmp_path: Path, capsys, words: tuple[str, ...]):
    assert run("explain", *words) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error or "/nowhere/journal" in error


def test_empty_journal_is_said_to_be_empty(tmp_path: Path, capsys):
    Journal(tmp_path / "j").close()
    assert run("explain", "--journal", tmp_path / "j") == 2
    assert "the journal is empty" in capsys.readouterr().err
