"""`mobula down`: end a fleet's processes, and no others."""

from __future__ import annotations

import contextlib
import shutil
from typing import Annotated

import psutil
import typer

from cli.fleet_home import FleetHome, Record, only_fleet
from cluster.errors import InvalidConfig

DRAIN_S = 75.0  # Requests drain for 30 s; then the gateway, workers and Ray end.
KILL_S = 5.0


def down(fleet: Annotated[str | None, typer.Argument(help="Name of the fleet; may be left out with only one up.")] = None) -> None:
    """Stop a fleet: requests finish, then every process ends."""
    home = FleetHome(only_fleet(fleet))
    record = home.record()
    if record is None:
        raise InvalidConfig(f"no fleet {home.path.name} is up: {home.record_path} is not there")
    killed = end_fleet(record)
    home.clear()
    typer.echo(f"{record.fleet} is down" + (f"; {killed} processes had to be killed" if killed else ""))


def end_fleet(record: Record) -> int:
    """SIGTERM for the supervisor, which ends the rest; SIGKILL for whatever of them is then still there. How many that were."""
    supervisor = record.supervisor.find()
    if supervisor is not None:
        below = _and_below(supervisor)
        supervisor.terminate()
        with contextlib.suppress(psutil.TimeoutExpired):
            supervisor.wait(DRAIN_S)
    else:
        below = []
    recorded = [process for name in record.processes if (process := name.find()) is not None]
    left = [process for process in {*below, *recorded} if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, KILL_S)
    if record.directory is not None:
        shutil.rmtree(record.directory, ignore_errors=True)
    return len(left)


def _and_below(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []
