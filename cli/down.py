"""`mobula down`: end a fleet's processes, and no others."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from cli.fleet_home import FleetHome, Record, only_fleet
from cli.joined_ray import joined_ray
from cli.local_ray import processes_in, put_away
from cluster.errors import InvalidConfig, Unreachable

STOP_S = 90.0  # Requests drain for 30 s in the gateway and then in the workers; Ray's shutdown has 20 s.
DRAIN_S = 30.0
KILL_S = 5.0
SWEEPS = 3  # What is killed may just have started another.


def down(fleet: Annotated[str | None, typer.Argument(help="Name of the fleet; may be left out with only one up.")] = None) -> None:
    """Stop a fleet: requests finish, then every process ends.

    Example: mobula down demo
    """
    home = FleetHome(only_fleet(fleet))
    record = home.record()
    if record is None:
        raise InvalidConfig(f"no fleet {home.path.name} is up: {home.record_path} is not there")
    with Console(stderr=True).status(f"stopping {record.fleet}: requests have {DRAIN_S:.0f} s to finish"):
        killed = end_fleet(record, home)
    typer.echo(f"{record.fleet} is down" + (f"; {killed} processes had to be killed" if killed else ""))


def end_fleet(record: Record, home: FleetHome) -> int:
    """SIGTERM for the supervisor, which ends the rest; SIGKILL for whatever of them is then still there. How many that were.

    Raises Unreachable with what the supervisor could not end in order, after all is ended.
    """
    supervisor = record.supervisor.find()
    if supervisor is not None:
        with contextlib.suppress(psutil.Error):
            supervisor.terminate()
            supervisor.wait(STOP_S)
    elif record.address is not None:
        _end_in_joined_ray(record, record.address)
    last = home.record() or record
    killed = _kill_left(last)
    if last.directory is not None:
        put_away(Path(last.directory), home.ray_logs_path)
    home.clear()
    if last.faults:
        raise Unreachable(f"{record.fleet} is down, but not in order: {'; '.join(last.faults)} (see {home.log_path})")
    return killed


def _end_in_joined_ray(record: Record, address: str) -> None:
    """What a supervisor that is gone has left in a Ray that is not its own."""
    with joined_ray(address):
        from controller.start import stop_controller
        from gateway.deployment import shutdown

        shutdown(record.fleet)
        asyncio.run(stop_controller(record.fleet, DRAIN_S))


def _kill_left(record: Record) -> int:
    """How many there were."""
    killed = set()
    for _ in range(SWEEPS):
        supervisor = record.supervisor.find()
        left = [supervisor] if supervisor is not None else []
        left += processes_in(Path(record.directory)) if record.directory is not None else []
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, KILL_S)
        killed |= {process.pid for process in left}
        if not left:
            break
    return len(killed)
