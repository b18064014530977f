"""What `up` and `down` do beside Ray: one fleet of a name, nothing forgotten, nothing kept silent."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from cli.down import down, end_fleet
from cli.fleet_home import FleetHome, ProcessId, Record, identify
from cli.local_ray import processes_in, put_away, show_logs
from cli.status import fetch
from cli.supervisor import _Supervisor
from cli.up import start
from cluster.errors import InvalidConfig, Unreachable

GONE = ProcessId(pid=2**22, started_s=0.0)  # Above any pid there is.
FLEET = """
name: one
models: [{name: tiny, path: hub/tiny}]
replicas: [{role: mixed, kv_blocks: 64, engine: emulated, pace: {shape: llama-3.1-8b, accelerator: h100}}]
gateway: {port: 1, allow_anonymous: true}
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBULA_HOME", str(tmp_path / "home"))
    home = FleetHome("one")
    home.make()
    return home


@pytest.fixture
def orphan(tmp_path):
    """A process that keeps a file open in a local Ray's directory."""
    directory = tmp_path / "ray-files"
    (directory / "ray/session_2026/logs").mkdir(parents=True)
    log = directory / "ray/session_2026/logs/worker.err"
    code = f"file = open({str(log)!r}, 'w'); file.write('last words'); file.flush(); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process, directory
        process.kill()


def config(tmp_path: Path, text: str = FLEET) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return path


def test_processes_are_known_by_what_they_hold_open(orphan):
    process, directory = orphan
    assert [found.pid for found in processes_in(directory)] == [process.pid]


def test_down_without_a_supervisor_kills_what_is_left_and_keeps_its_logs(home, orphan):
    process, directory = orphan
    record = Record(fleet="one", supervisor=GONE, url="", directory=str(directory))
    home.write_record(record)
    assert end_fleet(record, home) == 1
    assert not psutil.pid_exists(process.pid)
    assert not directory.exists()
    assert home.record() is None
    assert (home.ray_logs_path / "worker.err").read_text() == "last words"


def test_logs_have_one_place_while_a_fleet_runs_and_after(tmp_path):
    directory, logs = tmp_path / "files", tmp_path / "logs"
    logs.mkdir()
    (logs / "old.err").write_text("of the fleet before")
    (directory / "ray/session_2026/logs").mkdir(parents=True)
    (directory / "ray/session_2026/logs/new.err").write_text("now")
    (directory / "ray/session_latest").symlink_to(directory / "ray/session_2026")
    show_logs(directory, logs)
    assert [path.name for path in logs.iterdir()] == ["new.err"]
    put_away(directory, logs)
    assert [path.name for path in logs.iterdir()] == ["new.err"]
    assert not directory.exists()


def test_what_did_not_end_in_order_is_told_by_down(home):
    record = Record(fleet="one", supervisor=GONE, url="", faults=("gateway: still streams",))
    home.write_record(record)
    with pytest.raises(Unreachable, match="not in order: gateway: still streams"):
        end_fleet(record, home)
    assert home.record() is None


async def test_an_error_of_the_gateway_does_not_keep_the_workers_up(home):
    ended = []

    async def stop_workers():
        ended.append("workers")

    async def fail():
        raise RuntimeError("still streams")

    supervisor = _Supervisor(None, "", "", home, lambda progress: None, None)
    supervisor._begun, supervisor._stop_workers, supervisor._close_gateway = True, stop_workers, fail
    assert await supervisor._end() == ("gateway: still streams",)
    assert ended == ["workers"]


def test_a_second_fleet_of_the_name_is_refused_before_its_port_is_missed(home, tmp_path):
    home.write_record(Record(fleet="one", supervisor=identify(psutil.Process()), url="http://127.0.0.1:1"))
    with pytest.raises(InvalidConfig, match=f"fleet one is up as process {os.getpid()} at http://127.0.0.1:1"):
        start(config(tmp_path), None, Console(quiet=True))


def test_a_fleet_whose_supervisor_was_killed_is_refused_while_its_workers_run(home, tmp_path, orphan):
    home.write_record(Record(fleet="one", supervisor=GONE, url="", directory=str(orphan[1])))
    with pytest.raises(InvalidConfig, match="has lost its supervisor, but its workers still run; end it with `mobula down one`"):
        start(config(tmp_path), None, Console(quiet=True))


@pytest.mark.parametrize("act", ["up", "down"])
def test_a_broken_record_is_not_taken_for_a_fleet_that_is_not_there(home, tmp_path, act):
    home.record_path.write_text('{"garbage')
    with pytest.raises(InvalidConfig, match=r"record.json is broken: .* put it right, or end them by hand and remove it"):
        start(config(tmp_path), None, Console(quiet=True)) if act == "up" else down("one")


def test_a_broken_keys_file_is_refused_before_anything_starts(home, tmp_path):
    (tmp_path / "keys.json").write_text("secret\n")
    text = FLEET.replace("port: 1, allow_anonymous: true", "port: 65432, keys_file: keys.json")
    with pytest.raises(InvalidConfig, match=r"keys.json, line 1"):
        start(config(tmp_path, text), None, Console(quiet=True))


def test_a_home_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOBULA_HOME", str(tmp_path / "file"))
    with pytest.raises(InvalidConfig, match=r"file/one cannot be written: Not a directory"):
        FleetHome("one").make()


@pytest.mark.parametrize(
    ("supervisor", "words"),
    [(None, "is not up"), (GONE, "has lost its supervisor"), (identify(psutil.Process()), "is still starting")],
)
def test_status_says_why_there_is_no_answer(home, supervisor, words):
    if supervisor is not None:
        home.write_record(Record(fleet="one", supervisor=supervisor, url=""))
    with pytest.raises(Unreachable, match=words):
        fetch(home)
