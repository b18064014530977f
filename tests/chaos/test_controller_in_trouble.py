"""A controller whose starts fail, whose workers hang, whose journal is lost, and one that may only advise."""

from __future__ import annotations

import asyncio
import math
import sqlite3
import time
from pathlib import Path

import msgspec
import pytest

from cluster.errors import InvalidRequest
from cluster.fleet import PipelineSpec, PolicySpec
from cluster.replica import Phase
from cluster.snapshot import Hold
from controller import journal
from controller.directory import write_fleet
from controller.journal import Journal
from tests.chaos.world import FakeWorker, Script, World

NEVER = 1e12
FORTY_S = 1040.0


@pytest.fixture
def world(directory: Path):
    """A fleet that is to stay at one prefill and two decode replicas, up."""
    world = World(directory, Script(at_s=NEVER))
    world.new_controller()
    world.run(1006.0)
    assert world.roles() == (1, 2)
    yield world
    world.close()


def hung(world: World) -> str:
    """Has a decode worker hang, and answers with its name."""
    name = next(name for name in sorted(world.workers) if "decode" in name)
    world.silent.add(name)
    return name


def test_a_hung_worker_is_replaced_once_and_ended(world: World):
    victim = hung(world)
    world.run(1020.0)
    assert world.roles() == (1, 2)
    assert victim not in world.workers
    assert sum(world.started.values()) == 4


def test_a_worker_that_comes_back_from_a_partition_finds_its_place_taken(world: World):
    victim = hung(world)
    ended = world.end
    world.end = lambda worker_id: None if worker_id in world.silent else ended(worker_id)  # It is out of reach.
    world.run(1020.0)
    world.silent.clear()
    world.end = ended
    assert world.roles() == (1, 3)
    world.run(1024.0)
    assert world.roles() == (1, 2)
    assert victim not in world.workers


def test_a_partitioned_worker_is_fenced_by_the_next_controller_too(world: World):
    victim = hung(world)
    ended = world.end
    world.end = lambda worker_id: None if worker_id in world.silent else ended(worker_id)
    world.run(1020.0)
    world.new_controller()
    world.run(1030.0)
    world.silent.clear()
    world.end = ended
    world.run(1035.0)
    assert victim not in world.workers
    assert world.roles() == (1, 2)


def test_workers_that_register_together_are_looked_at_together(world: World, monkeypatch: pytest.MonkeyPatch):
    looks = []
    monkeypatch.setattr(world.controller.watch, "table_changed", lambda: looks.append(world.now_s))
    with world.loop.current():
        for worker in world.workers.values():
            world.controller.register((msgspec.structs.replace(worker.row, revision="new"),))
    world.run(world.now_s + 0.2)
    assert len(looks) == 1


def test_a_fleet_that_takes_long_to_register_with_a_new_controller_is_kept(world: World):
    register, names, began_s = world.register, sorted(world.workers), world.now_s

    def late(worker: FakeWorker) -> None:
        if world.now_s >= began_s + 4.0 * (1 + names.index(worker.worker_id)):
            register(worker)

    world.register = late
    world.new_controller()
    world.run(began_s + 30.0)
    assert sorted(world.workers) == names
    assert (sum(world.started.values()), world.lost_streams) == (3, 0)


def test_a_start_that_keeps_failing_is_given_up_and_says_why(directory: Path):
    world = World(directory, Script(at_s=NEVER))
    world.failing |= {"a", "b"}
    world.new_controller()
    world.run(1000.0 + 300.0)
    assert 5 <= sum(count for name, count in world.started.items() if name.startswith("decode")) <= 7, world.started
    last = Journal(directory / "journal.sqlite", read_only=True).last()
    assert any("starts failed 5 times" in one.why for one in last.decision.dropped)
    world.close()


def test_a_node_that_never_gets_ready_is_avoided_after_a_bounded_wait(directory: Path):
    world = World(directory, Script(at_s=NEVER))
    groups = tuple(msgspec.structs.replace(group, start_timeout_s=20.0) for group in world.fleet.replicas)
    world.never_ready.add("a")
    write_fleet(directory, msgspec.structs.replace(world.fleet, replicas=groups))
    world.new_controller()
    world.run(1000.0 + 60.0)
    assert world.roles() == (1, 2)
    assert {worker.node for worker in world.workers.values() if worker.phase is Phase.READY} == {"b"}
    assert world.controller.controller.memory.failed_starts
    world.close()


def test_a_fleet_whose_journal_is_lost_is_kept_as_it_runs(directory: Path):
    world = World(directory, Script(at_s=1006.0, decode=4))
    world.new_controller()
    world.run(1014.0)
    assert world.roles() == (1, 4)
    for file in directory.glob("journal*"):
        file.unlink()
    world.new_controller()
    world.run(FORTY_S)
    assert world.roles() == (1, 4)
    assert sum(world.started.values()) == 5
    world.close()


def test_a_journal_that_cannot_be_read_is_put_aside(directory: Path):
    world = World(directory, Script(at_s=NEVER))
    (directory / "journal.sqlite").write_bytes(b"no database, but long enough to be looked at as one" * 50)
    world.new_controller()
    world.run(1006.0)
    assert world.roles() == (1, 2)
    assert len(list(directory.glob("*.broken"))) == 1
    world.close()


def test_a_journal_whose_last_pass_is_damaged_is_put_aside_and_the_fleet_kept(directory: Path):
    world = World(directory, Script(at_s=NEVER))
    world.new_controller()
    world.run(1006.0)
    with sqlite3.connect(directory / "journal.sqlite") as journal:
        journal.execute("UPDATE passes SET frame = x'00' WHERE number = (SELECT max(number) FROM passes)")
    world.new_controller()
    world.run(1020.0)
    assert world.roles() == (1, 2)
    assert sum(world.started.values()) == 3
    assert len(list(directory.glob("*.broken"))) == 1
    world.close()


def test_a_damaged_pass_of_long_ago_stops_nobody(directory: Path):
    world = World(directory, Script(at_s=NEVER))
    world.new_controller()
    world.run(1006.0)
    with sqlite3.connect(directory / "journal.sqlite") as journal:
        assert journal.execute("UPDATE passes SET decision = x'00' WHERE changes > 0").rowcount > 0
    world.new_controller()
    world.run(1020.0)
    assert world.roles() == (1, 2)
    assert sum(world.started.values()) == 3
    assert world.controller.status().epoch == 2
    world.close()


def test_status_tells_what_became_of_decisions(directory: Path):
    world = World(directory, Script(at_s=NEVER))
    world.failing.add("a")
    world.new_controller()
    world.run(1010.0)
    told = {change.text: change.outcome for change in world.controller.status().changes}
    assert any(text.endswith("on a") and outcome.startswith("failed: no weights on a") for text, outcome in told.items())
    assert any(text.endswith("on b") and outcome.startswith("ready after") for text, outcome in told.items())
    world.close()


def test_a_fleet_that_is_stopped_does_not_wait_for_who_hangs(world: World):
    world.silent.add(next(name for name in sorted(world.workers) if "decode" in name))
    world.running.cancel()
    with world.loop.current():
        over = world.loop.create_task(world.controller.shutdown(60.0))
    world.run(1006.0 + 12.0)
    assert over.done()
    assert world.workers == {}
    assert over.exception() is None


@pytest.mark.parametrize("step_s", [math.nan, math.inf, -1.0])
def test_a_replica_whose_performance_is_no_number_is_not_counted_on(world: World, step_s: float):
    row = next(iter(world.workers.values())).row
    mad = msgspec.structs.replace(row, performance=msgspec.structs.replace(row.performance, step_s=step_s))
    with pytest.raises(InvalidRequest, match="step_s is no number"):
        world.controller.register((mad,))


def test_a_full_disk_is_counted_and_the_fleet_controlled_on(world: World, monkeypatch: pytest.MonkeyPatch):
    def full(entry: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(world.controller.controller.journal, "write", full)
    hung(world)
    world.run(1020.0)
    assert world.roles() == (1, 2)
    assert world.controller.status().unwritten >= 10


def test_an_adviser_brings_its_fleet_up_and_then_only_advises(directory: Path):
    world = World(directory, Script(at_s=1010.0, decode=5), mode="advise")
    world.new_controller()
    world.run(1030.0)
    assert world.roles() == (1, 2)
    last = Journal(directory / "journal.sqlite", read_only=True).last()
    assert (last.mode, last.decision.targets["m/decode/default"]) == ("advise", 5)
    told = [change.text for change in world.controller.status().changes]
    assert len(told) == len(set(told)), "advice that is given again each second is told once"
    world.new_controller()
    world.run(FORTY_S)
    assert world.roles() == (1, 2)
    assert sum(world.started.values()) == 3
    world.close()


def test_what_an_operator_holds_outlives_the_controller(world: World):
    pause = Hold(kind="pause", author="ada", expires_s=time.time() + 600.0)  # By the clock of whoever says it.
    with world.loop.current():
        said = asyncio.ensure_future(world.controller.hold(pause))
    world.run(1008.0)
    assert said.done()
    world.new_controller()
    world.run(1020.0)
    (held,) = world.controller.status().holds
    assert (held.kind, held.author) == ("pause", "ada")
    assert 1600.0 <= held.expires_s <= 1620.0


def test_another_config_takes_effect_with_the_next_pass_and_outlives_the_controller(world: World):
    fleet = world.fleet
    settings = msgspec.to_builtins(Script(at_s=0.0, decode=4))
    (policy,) = fleet.control.pipeline.policies
    pipeline = msgspec.structs.replace(fleet.control.pipeline, policies=(msgspec.structs.replace(policy, settings=settings),))
    with world.loop.current():
        world.controller.reload(msgspec.structs.replace(fleet, control=msgspec.structs.replace(fleet.control, pipeline=pipeline)))
    world.run(1015.0)
    assert world.roles() == (1, 4)
    world.new_controller()
    world.run(FORTY_S)
    assert world.roles() == (1, 4)


def test_another_bound_of_the_journal_counts_at_once(world: World):
    control = msgspec.structs.replace(world.fleet.control, journal_bytes=2**24)
    world.controller.reload(msgspec.structs.replace(world.fleet, control=control))
    assert world.controller._journal.max_bytes == 2**24


def test_challengers_are_journaled_beside_what_is_done(directory: Path):
    keep = PipelineSpec(policies=(PolicySpec(use="policies.keep:Keep"),), guards=())
    world = World(directory, Script(at_s=1006.0, decode=4), challengers={"keep": keep})
    world.new_controller()
    world.run(1008.0)
    entries = [entry for entry in Journal(directory / "journal.sqlite", read_only=True).entries() if entry.decision.actions]
    assert [entry.shadows["keep"].targets["m/decode/default"] for entry in entries] == [2, 2]
    assert entries[-1].decision.targets["m/decode/default"] == 4
    world.close()


def test_a_controller_that_starts_on_a_full_disk_goes_on_from_its_journal_and_writes_again_later(
    directory: Path, monkeypatch: pytest.MonkeyPatch
):
    world = World(directory, Script(at_s=1006.0, decode=4))
    world.new_controller()
    world.run(1014.0)
    full = {"is": True}
    connect = journal._connect

    def refuse(path: Path, read_only: bool) -> sqlite3.Connection:
        if full["is"] and not read_only and str(path) != ":memory:":
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return connect(path, read_only)

    monkeypatch.setattr(journal, "_connect", refuse)
    world.new_controller()
    world.run(1025.0)
    assert world.roles() == (1, 4)
    assert sum(world.started.values()) == 5
    assert world.controller.epoch == 2
    assert world.controller.status().unwritten >= 5
    full["is"] = False
    world.run(1030.0)
    assert Journal(directory / "journal.sqlite", read_only=True).last().epoch == 2
    world.close()


def test_a_config_that_is_damaged_is_read_as_it_was_before(directory: Path):
    world = World(directory, Script(at_s=1e12))
    write_fleet(directory, world.fleet)
    (directory / "fleet.json").write_text("xx")
    world.new_controller()
    world.run(1006.0)
    assert world.roles() == (1, 2)
    world.close()
