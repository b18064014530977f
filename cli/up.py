"""`mobula up`: start a fleet and return when it serves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

import cli
from cli.fleet_home import FleetHome
from cli.supervisor import Order, Progress
from cluster.errors import InvalidConfig, Unreachable
from cluster.fleet import Fleet

STOP_S = 90.0  # Longer than draining, Ray's shutdown and the last kill together.


def up(
    file: Annotated[Path, typer.Option("--file", "-f", help="The fleet to start, a cluster.yaml.")] = Path("cluster.yaml"),
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting a local one.")] = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay until Ctrl-C, which stops the fleet.")] = False,
) -> None:
    """Start a fleet: Ray, workers and gateway. Returns when all is ready."""
    process, url = start(file, address, Console(stderr=True))
    typer.echo(url)
    if foreground:
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()
        end(process)


def start(file: Path, address: str | None, console: Console) -> tuple[subprocess.Popen[bytes], str]:
    """The supervisor's process and the URL it serves at. Raises MobulaError with nothing left running."""
    from controller.config import read_fleet

    fleet = read_fleet(file)
    home = FleetHome(fleet.name)
    _refuse_second(fleet, home)
    home.make()
    process, progress = _spawn(Order(fleet=fleet, address=address), home)
    try:
        with progress:
            return process, _follow(progress, home, console)
    except BaseException:
        end(process)
        raise


def end(process: subprocess.Popen[bytes]) -> None:
    """Have a supervisor stop everything; without an answer, kill it: its children follow."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _refuse_second(fleet: Fleet, home: FleetHome) -> None:
    record = home.record()
    if record is not None and record.supervisor.find() is not None:
        running = f"is up as process {record.supervisor.pid} at {record.url}"
        raise InvalidConfig(f"fleet {fleet.name} {running}; end it with `mobula down {fleet.name}`")


def _spawn(order: Order, home: FleetHome) -> tuple[subprocess.Popen[bytes], BinaryIO]:
    """A session of its own, so that the terminal's signals do not reach it; its log is the fleet's log."""
    reading, writing = os.pipe()
    root = str(Path(cli.__file__).parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    with home.log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.supervisor", home.path.name, str(writing)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(writing,),
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
    os.close(writing)
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(msgspec.msgpack.encode(order))
    return process, os.fdopen(reading, "rb")


def _follow(progress: BinaryIO, home: FleetHome, console: Console) -> str:
    """Show the supervisor's progress until it is ready; the URL. Raises Unreachable with its last words."""
    with _bars(console) as bars:
        task: TaskID | None = None
        for line in progress:
            said = msgspec.json.decode(line, type=Progress)
            match said.kind:
                case "ready":
                    return said.text
                case "failed":
                    raise Unreachable(said.text)
                case "phase":
                    if task is not None:
                        bars.update(task, total=1, completed=1)
                    task = bars.add_task(said.text, total=said.total or 1)
                case "step":
                    bars.advance(task)
    raise Unreachable(f"the supervisor ended without a word; see {home.log_path}")


@contextlib.contextmanager
def _bars(console: Console) -> Iterator[Bars]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console) as bars:
        yield bars
