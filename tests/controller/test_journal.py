"""What was decided is on disk, whole, bounded, and readable by others."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cluster.actions import Action, Decision, DrainReplica, Reason, StartReplica
from cluster.errors import InvalidTrace
from controller.journal import KEYFRAME_EVERY, Entry, Journal, Outcome
from policies.pipeline import Pipeline
from policies.scaling import Scaling
from tests.policies.clusters import NOW_S, cluster, group, steady

PIPELINE = Pipeline(policies=(Scaling(),), guards=())


def entry(number: int, **more) -> Entry:
    snapshot = cluster([group(wanted=1 + number % 3)], [steady(30.0 + number)], pass_number=number, now_s=NOW_S + number)
    return Entry(
        **{"epoch": 1, "pipeline": "{}", "mode": "act", "snapshot": snapshot, "decision": PIPELINE.decide(snapshot), **more}
    )


def test_what_is_written_is_read(tmp_path: Path):
    journal, written = Journal(tmp_path / "j"), [entry(number) for number in range(KEYFRAME_EVERY * 2 + 7)]
    for one in written:
        journal.write(one)
    reader = Journal(tmp_path / "j", read_only=True)
    assert list(reader.entries()) == written
    assert reader.entry(KEYFRAME_EVERY + 3) == written[KEYFRAME_EVERY + 3]
    assert reader.last() == written[-1]
    assert reader.at(NOW_S + 9.5) == 9
    assert reader.at(NOW_S - 1.0) is None
    with pytest.raises(KeyError):
        reader.entry(4711)


def test_read_decisions_are_decided_again_alike(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    for number in range(70):
        journal.write(entry(number))
    for one in journal.entries():
        assert PIPELINE.decide(one.snapshot) == one.decision


def test_shadows_and_outcomes_stand_beside_their_pass(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    journal.write(entry(1, shadows={"cheap": Decision(failed="x")}))
    journal.add([Outcome(number=1, action=0, at_s=NOW_S + 2, outcome="done")])
    assert journal.entry(1).shadows == {"cheap": Decision(failed="x")}
    assert [one.outcome for one in journal.outcomes(1)] == ["done"]
    assert journal.last_change() == 1
    assert journal.last_change(NOW_S) is None


def test_oldest_passes_go_when_the_bound_is_reached(tmp_path: Path):
    journal = Journal(tmp_path / "j", max_bytes=200_000)
    for number in range(1, 1201):
        journal.write(entry(number))
    assert journal.used_bytes <= 200_000
    kept = [one.number for one in journal.entries()]
    assert kept[-1] == 1200
    assert kept[0] > 1
    assert kept == list(range(kept[0], 1201))


def test_other_schema_and_what_is_no_journal_are_refused(tmp_path: Path):
    Journal(tmp_path / "j").close()
    with sqlite3.connect(tmp_path / "j") as db:
        db.execute("UPDATE journal SET schema = 99")
    with pytest.raises(InvalidTrace, match="schema 99; this release reads 2"):
        Journal(tmp_path / "j")
    (tmp_path / "text").write_text("not a database, but a text that is long enough to be read as a header\n" * 10)
    with pytest.raises(InvalidTrace, match="is no journal"):
        Journal(tmp_path / "text")


def write_all(journal: Journal, numbers: range) -> None:
    for number in numbers:
        journal.write(entry(number))


def test_full_disk_is_told_and_the_next_pass_is_whole_again(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    journal.write(entry(1))
    journal._db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(OSError, match="full"):
        write_all(journal, range(2, 500))
    journal._db.execute("PRAGMA max_page_count = 100000")
    journal.write(entry(600))
    assert [one.number for one in journal.entries()][-1] == 600


def test_killed_writer_leaves_every_finished_pass(tmp_path: Path):
    program = """
        import sys, pathlib
        from controller.journal import Journal
        from tests.controller.test_journal import entry
        journal = Journal(pathlib.Path(sys.argv[1]))
        for number in range(1, 100000):
            journal.write(entry(number))
            print(number, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "j")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as writer:
        for line in writer.stdout:
            if int(line) == 75:
                break
        os.kill(writer.pid, signal.SIGKILL)
    finished = [one.number for one in Journal(tmp_path / "j").entries()]
    assert finished == list(range(1, len(finished) + 1))
    assert len(finished) >= 75


def acting(number: int, *actions: Action, wanted: int = 1) -> Entry:
    snapshot = cluster([group(wanted=wanted)], [steady(1.0)], pass_number=number, now_s=NOW_S + number)
    decision = Decision(targets={"m/mixed/p": wanted}, actions=actions)
    return Entry(epoch=1, pipeline="{}", mode="act", snapshot=snapshot, decision=decision)


def start(name: str) -> StartReplica:
    return StartReplica(replica_id=name, group="m/mixed/p", node="n1", reason=Reason(text="because"))


def test_whatever_the_database_refuses_is_told_as_the_disks_error(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    journal.write(acting(1))
    with pytest.raises(OSError, match="UNIQUE"):
        journal.write(acting(1))
    journal.write(acting(2))
    assert journal.last() == acting(2)


def test_last_pass_that_touched_a_replica_its_group_or_its_role_is_found(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    drain = DrainReplica(replica_id="mixed-p-0", deadline_s=NOW_S, reason=Reason(text="because"))
    for one in (acting(1, start("mixed-p-10")), acting(2), acting(3, drain), acting(4)):
        journal.write(one)
    reader = Journal(tmp_path / "j", read_only=True)
    found = {name: reader.last_touch(name) for name in ("mixed-p-10", "mixed-p-1", "mixed-p-0", "m/mixed/p", "mixed", "other")}
    assert found == {"mixed-p-10": 1, "mixed-p-1": None, "mixed-p-0": 3, "m/mixed/p": 3, "mixed": 3, "other": None}
    assert reader.last_touch("mixed", NOW_S + 2.5) == 1
    assert reader.last_touch("mixed-p-10", NOW_S + 0.5) is None


def test_changes_are_the_latest_passes_that_act_in_order(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    for number in range(20):
        journal.write(acting(number, *([start(f"mixed-p-{number}")] if number % 3 == 0 else [])))
    assert [one.number for one in journal.changes(most=3)] == [12, 15, 18]
    assert [one.number for one in journal.changes(NOW_S + 14, most=30)] == [15, 18]


def test_decisions_are_read_without_what_was_seen(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    written = [entry(number, shadows={"calm": Decision(failed=str(number))}) for number in range(5, KEYFRAME_EVERY + 9)]
    for one in written:
        journal.write(one)
    read = list(journal.choices(NOW_S + 8))
    assert [(one.number, one.decision, one.shadows) for one in read] == [
        (one.number, one.decision, one.shadows) for one in written[3:]
    ]
    assert list(journal.choices(NOW_S + 1e6)) == []
    assert journal.count(NOW_S + 8) == len(read)
    assert journal.first_since(NOW_S + 7.5) == 8
    assert journal.span == (NOW_S + 5, NOW_S + KEYFRAME_EVERY + 8)


def test_keyframe_is_the_last_whole_snapshot(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    written = [entry(number) for number in range(1, KEYFRAME_EVERY + 9)]
    for one in written:
        journal.write(one)
    assert journal.keyframe(7) == written[0].snapshot
    assert journal.keyframe(KEYFRAME_EVERY + 5) == written[KEYFRAME_EVERY].snapshot
    with pytest.raises(KeyError):
        journal.keyframe(0)


def test_empty_journal_has_no_span_and_no_passes(tmp_path: Path):
    journal = Journal(tmp_path / "j")
    assert (journal.span, journal.count(), journal.first_since(0.0), journal.at(NOW_S), journal.last_touch("m")) == (
        None, 0, None, None, None,
    )  # fmt: skip
