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
import psutil
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

import cli
from cli.down import end_fleet
from cli.fleet_home import FleetHome, Record, identify
from cli.local_ray import processes_in
from cli.supervisor import Order, Progress
from cluster.errors import InvalidConfig, Unreachable


def up(
    file: Annotated[Path, typer.Option("--file", "-f", help="The fleet to start, a cluster.yaml.")] = Path("cluster.yaml"),
    address: Annotated[str | None, typer.Option(help="Join this Ray cluster instead of starting a local one.")] = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay until Ctrl-C, which stops the fleet.")] = False,
) -> None:
    """Start a fleet: Ray, workers and gateway. Returns when all is ready, with the URL on stdout.

    Examples:

    mobula up -f cluster.yaml

    mobula up -f cluster.yaml --address 10.0.0.7:6379
    """
    console = Console(stderr=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    process, url, home = start(file, address, console)
    typer.echo(url)
    console.print(f"logs: {home.path}", highlight=False, soft_wrap=True)
    if foreground:
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()
        end(process, home, console)


def start(file: Path, address: str | None, console: Console) -> tuple[subprocess.Popen[bytes], str, FleetHome]:
    """The supervisor's process, the URL it serves at, and where it is recorded. Raises MobulaError with nothing left running."""
    from controller.config import check_fleet, load_fleet
    from gateway.keys import read_keys

    fleet = load_fleet(file)
    home = FleetHome(fleet.name)
    _refuse_second(home)
    check_fleet(file, fleet, here=address is None)
    if fleet.gateway.keys_file is not None:
        read_keys(fleet.gateway.keys_file)
    home.make()
    home.clear()
    process, progress = _spawn(Order(fleet=fleet, address=address), home)
    try:
        with progress:
            return process, _follow(progress, home, console), home
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            console.print("stopping what has started")
        end(process, home, console)
        raise


def end(process: subprocess.Popen[bytes], home: FleetHome, console: Console) -> None:
    """Have a supervisor stop everything, however far it is."""
    if process.poll() is None:
        alone = Record(fleet=home.path.name, supervisor=identify(psutil.Process(process.pid)), url="")
        try:
            end_fleet(home.record() or alone, home)
        except Unreachable as error:
            console.print(str(error), style="red", markup=False, soft_wrap=True)
        process.wait()


def _refuse_second(home: FleetHome) -> None:
    record = home.record()
    if record is None:
        return
    by_hand = f"end it with `mobula down {record.fleet}`"
    if record.supervisor.find() is not None:
        raise InvalidConfig(f"fleet {record.fleet} is up as process {record.supervisor.pid} at {record.url}; {by_hand}")
    if record.directory is not None and processes_in(Path(record.directory)):
        raise InvalidConfig(f"fleet {record.fleet} has lost its supervisor, but its workers still run; {by_hand}")


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
    """Show the supervisor's progress until it is ready; the URL. Raises its last words."""
    with _bars(console) as bars:
        task: TaskID | None = None
        for line in progress:
            said = msgspec.json.decode(line, type=Progress)
            if task is not None and said.kind in ("phase", "ready"):
                bars.update(task, completed=bars.tasks[task].total)
            match said.kind:
                case "ready":
                    return said.text
                case "failed":
                    raise InvalidConfig(said.text) if said.permanent else Unreachable(said.text)
                case "phase":
                    task = bars.add_task(said.text, total=said.total)
                case "step":
                    bars.advance(task)
    raise Unreachable(f"the supervisor ended without a word; see {home.log_path}")


@contextlib.contextmanager
def _bars(console: Console) -> Iterator[Bars]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console) as bars:
        yield bars
