"""A journal is listed in lines, and decided again."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from cli import journal as command
from cli.main import main
from cluster.actions import Action, ChangeRole, Decision, DrainReplica, Reason, StartReplica
from cluster.fleet import PipelineSpec
from controller.journal import Entry, Journal
from controller.pipelines import as_text
from tests.controller.scripted import LOST_AT, play
from tests.policies.clusters import BUCKET_S, NOW_S, cluster, group, steady


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(command.time, "time", lambda: NOW_S + 1000.0)


def run(*words: str | Path) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(["journal", *(str(word) for word in words)])
    return ended.value.code


def listed(capsys: pytest.CaptureFixture[str], path: Path, *words: str) -> list[command.Line]:
    assert run("list", "--journal", path, "--json", *words) == 0
    return msgspec.json.decode(capsys.readouterr().out, type=list[command.Line])


def moves(entries: Iterable[Entry]) -> list[ChangeRole]:
    return [one for entry in entries for one in entry.decision.actions if isinstance(one, ChangeRole)]


def why(entry: Entry, action: Action) -> str:
    """A start for a target that stays replaces what is missing; all else has the policy's reason."""
    stays = (
        isinstance(action, StartReplica)
        and entry.decision.targets[action.group] == entry.snapshot.group_by_name[action.group].wanted
    )
    return "the target stays, and what is missing is replaced" if stays else action.reason.text


def test_every_pass_that_changed_something_is_a_line_with_its_reason(played: Path, capsys):
    lines = {line.number: line for line in listed(capsys, played)}
    changes = {entry.number: entry for entry in Journal(played, read_only=True).entries() if entry.decision.actions}
    assert sorted(lines) == sorted(changes)
    for number, entry in changes.items():
        actions, parts = entry.decision.actions, lines[number].what.split("; ")
        starts = Counter(one.group for one in actions if isinstance(one, StartReplica))
        assert {one for one in parts if one.startswith("start ")} == {f"start {count} of {name}" for name, count in starts.items()}
        assert {one for one in parts if " becomes " in one} == {
            f"{one.replica_id} becomes {one.role.value}" for one in moves([entry])
        }
        drained = [one.replica_id for one in actions if isinstance(one, DrainReplica)]
        assert [one.split(" and ")[0] for one in parts if one.startswith("drain ")] == [f"drain {', '.join(drained[:2])}"] * bool(
            drained
        )
        assert lines[number].why == "; ".join(dict.fromkeys(why(entry, one) for one in actions))
    assert lines[LOST_AT].why == "the target stays, and what is missing is replaced"
    assert moves(changes.values())


def test_latest_are_listed_and_bounded_by_number_and_time(played: Path, capsys):
    changes = [one.number for one in Journal(played, read_only=True).changes(most=100)]
    assert [line.number for line in listed(capsys, played, "--last", "2")] == changes[-2:]
    for number, expected in ((changes[-4], changes[-4:]), (changes[-4] + 1, changes[-3:])):
        since = f"-{1000 - number * BUCKET_S:.0f}s"
        assert [line.number for line in listed(capsys, played, "--since", since)] == expected


def test_table_fits_the_terminal(played: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run("list", "--journal", played) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    words = {word.rstrip(";") for word in out.split()}
    changes = [entry for entry in Journal(played, read_only=True).entries() if entry.decision.actions]
    assert words >= {str(entry.number) for entry in changes}
    assert moves(changes)
    assert words >= {word for one in moves(changes) for word in one.words.split()}


def test_same_advice_in_a_row_is_one_line(tmp_path: Path, capsys):
    journal = Journal(tmp_path / "j")
    reason = Reason(text="because")
    for number, names in enumerate(("abcd", "abcd", "abcd", "e")):
        drains = tuple(DrainReplica(replica_id=name, deadline_s=0.0, reason=reason) for name in names)
        snapshot = cluster([group()], [steady(1.0)], pass_number=number, now_s=NOW_S + number)
        journal.write(Entry(epoch=1, pipeline="{}", mode="advise", snapshot=snapshot, decision=Decision(actions=drains)))
    assert [(line.number, line.what, line.times) for line in listed(capsys, tmp_path / "j")] == [
        (2, "drain a, b and 2 more", 3),
        (3, "drain e", 1),
    ]


def test_what_was_only_advised_is_marked_and_each_act_stands_for_itself(tmp_path: Path, capsys):
    journal = Journal(tmp_path / "j")
    reason = Reason(text="because")
    for number, mode in enumerate(("advise", "advise", "act", "act")):
        start = StartReplica(replica_id=f"d-{number}", group="m/decode/p", node="n0", reason=reason)
        snapshot = cluster([group()], [steady(1.0)], pass_number=number, now_s=NOW_S + number)
        journal.write(Entry(epoch=1, pipeline="{}", mode=mode, snapshot=snapshot, decision=Decision(actions=(start,))))
    assert [(line.number, line.advised, line.times) for line in listed(capsys, tmp_path / "j")] == [
        (1, True, 2),
        (2, False, 1),
        (3, False, 1),
    ]
    assert run("list", "--journal", tmp_path / "j") == 0
    assert "start 1 of m/decode/p (advised, 2 passes)" in " ".join(capsys.readouterr().out.split())


def test_nothing_changed_is_said(tmp_path: Path, capsys):
    Journal(tmp_path / "j").close()
    assert run("list", "--journal", tmp_path / "j") == 0
    assert capsys.readouterr().out == "no pass has changed anything\n"


def test_journal_that_replays_equal_ends_with_0(played: Path, capsys):
    assert run("replay", "--journal", played) == 0
    assert capsys.readouterr().out == "156 passes decided again: 156 agree, 0 differ\n"


def test_first_differences_are_shown_by_field_and_end_with_1(tmp_path: Path, capsys):
    journal = play(tmp_path / "j")
    last = journal.last()
    for number in range(200, 205):
        snapshot = msgspec.structs.replace(last.snapshot, pass_number=number)
        decision = msgspec.structs.replace(last.decision, targets={**last.decision.targets, "m/prefill/p": number})
        journal.write(Entry(epoch=1, pipeline=as_text(PipelineSpec()), mode="act", snapshot=snapshot, decision=decision))
    assert run("replay", "--journal", tmp_path / "j") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "161 passes decided again: 156 agree, 5 differ"
    target = last.decision.targets["m/prefill/p"]
    assert lines[1:3] == ["pass 200:", f"  targets.m/prefill/p: 200 was recorded, {target} now"]
    assert [line for line in lines if line.startswith("pass ")] == ["pass 200:", "pass 201:", "pass 202:"]


def test_many_different_fields_are_cut(tmp_path: Path, capsys):
    journal = Journal(tmp_path / "j")
    snapshot = cluster([group()], [steady(60.0)], pass_number=1)
    journal.write(Entry(epoch=1, pipeline=as_text(PipelineSpec()), mode="act", snapshot=snapshot, decision=Decision(failed="x")))
    assert run("replay", "--journal", tmp_path / "j") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("  actions: 0 were recorded, ")
    assert "  failed: 'x' was recorded, '' now" in lines


def test_unknown_schema_and_unknown_policies_end_with_2(tmp_path: Path, capsys):
    play(tmp_path / "j").close()
    with sqlite3.connect(tmp_path / "j") as db:
        db.execute('UPDATE pipelines SET config = \'{"policies":[{"use":"gone:Away"}]}\'')
    assert run("replay", "--journal", tmp_path / "j") == 2
    assert "'gone:Away' cannot be imported" in capsys.readouterr().err
    with sqlite3.connect(tmp_path / "j") as db:
        db.execute("UPDATE journal SET schema = 99")
    assert run("replay", "--journal", tmp_path / "j") == 2
    assert "schema 99; this release reads 2" in capsys.readouterr().err
