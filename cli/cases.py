"""What the comparing commands share: which traffic, in which world, on which machines, and how far they are."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cluster.errors import InvalidConfig, MobulaError

if TYPE_CHECKING:
    from simulator.case import Case, Traffic
    from simulator.outcome import Outcome
    from simulator.runs import Runner
    from simulator.store import Store

FEW = 2
"""So many runs are done here: starting Ray would take longer than it saves."""
EXIT_INTERRUPTED = 130  # As a shell says of a command that SIGINT ended.


def _option(panel: str, metavar: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, metavar=metavar, help=help, **more)


TRACE, RUNS = "Trace", "Runs"
TRACE_HELP = "Trace file (Azure LLM, Mooncake, BurstGPT, request log) or generator (poisson, gamma, steps, diurnal, sessions)."
TraceText = Annotated[str, typer.Argument(metavar="TRACE", help=TRACE_HELP)]
Start = Annotated[float, _option(TRACE, "MIN", "Minutes of the trace to skip.", min=0)]
Minutes = Annotated[float | None, _option(TRACE, "MIN", "Minutes to play; all by default.", min=1e-6)]
ScaleRate = Annotated[float, _option(TRACE, "X", "2 plays the trace twice as fast.", min=1e-6)]
ScalePrompt = Annotated[float, _option(TRACE, "X", "Factor for prompt lengths.", min=1e-6)]
ScaleOutput = Annotated[float, _option(TRACE, "X", "Factor for output lengths.", min=1e-6)]
WorldFile = Annotated[Path | None, _option(RUNS, "FILE", "How the simulated world differs from what policies believe.")]
WarmUp = Annotated[float, _option(RUNS, "S", "Requests of the first seconds do not count.", min=0)]
Out = Annotated[Path | None, _option(RUNS, "DIR", "Keep each run's outcome there; what is there already is not run again.")]
Address = Annotated[str | None, _option(RUNS, "HOST:PORT", "Join this Ray cluster instead of starting a local one.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]


def traffic_of(trace: str, start: float, minutes: float | None, rate: float, prompt: float, output: float) -> Traffic:
    """As the command line says, seen from where it is."""
    from simulator.case import Traffic
    from simulator.sweep import seen_from

    traffic = Traffic(trace=trace, start=start, minutes=minutes, rate=rate, prompt=prompt, output=output)
    return seen_from(traffic, Path.cwd())


def case_of(path: Path, world: Path | None, traffic: Traffic, warm_up_s: float) -> Case:
    """Of a cluster.yaml that need not be startable here. Raises InvalidConfig."""
    from controller.config import check_unstarted, load_fleet
    from simulator.case import Case
    from simulator.world import World
    from simulator.world_file import load_world

    fleet = load_fleet(path)
    check_unstarted(path, fleet)
    return Case(fleet=fleet, world=World() if world is None else load_world(world), traffic=traffic, warm_up_s=warm_up_s)


@contextlib.contextmanager
def kept(directory: Path | None) -> Iterator[Store]:
    """Where outcomes are kept: a directory, or none that outlives the command."""
    from simulator.store import Store

    with contextlib.ExitStack() as stack:
        path = directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mobula-runs-")))
        yield stack.enter_context(Store(path))


@contextlib.contextmanager
def progress_bar(console: Console, total: int | None) -> Iterator[tuple[Progress, Any]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress, progress.add_task("", total=total)


def carry_out(cases: Mapping[str, tuple[str, Case]], store: Store, address: str | None, console: Console) -> dict[str, MobulaError]:
    """Run all that the store does not have, by key; each with its name for people. Those that failed, with why."""
    from simulator.runs import remaining

    left = remaining({key: case for key, (_, case) in cases.items()}, store)
    said = f"{len(cases)} runs" + (f", {len(cases) - len(left)} of them known" if len(left) < len(cases) else "")
    console.print(said, markup=False, highlight=False)
    failed: dict[str, MobulaError] = {}
    if not left:
        return failed
    with runner(len(left), address) as run, progress_bar(console, len(cases)) as (progress, bar):
        known = len(cases) - len(left)
        progress.update(bar, completed=known)
        for ended_runs, (key, ended) in enumerate(run(left), known + 1):
            progress.update(bar, completed=ended_runs, description=cases[key][0])
            if isinstance(ended, MobulaError):
                failed[key] = ended
                console.print(f"{cases[key][0]}: {ended}", style="red", markup=False, highlight=False, soft_wrap=True)
            else:
                store.add(key, cases[key][0], ended)
    return failed


def outcomes(cases: list[Case], store: Store) -> list[Outcome | None]:
    """What came of them, in their order; None where that is not known."""
    from simulator.digest import key_of

    return [store.get(key_of(case)) for case in cases]


@contextlib.contextmanager
def runner(count: int, address: str | None) -> Iterator[Runner]:
    """What carries out so many cases: a Ray to join, a local one, or this process."""
    from simulator.runs import in_turn, on_ray

    if address is not None:
        from cli.joined_ray import joined_ray

        with joined_ray(address):
            yield on_ray
    elif count <= FEW or (os.cpu_count() or 1) == 1:
        yield in_turn
    else:
        with _local_ray():
            yield on_ray


@contextlib.contextmanager
def _local_ray() -> Iterator[None]:
    """Every core of this machine, as one Ray node that ends with us."""
    from cli.local_ray import LocalRay, adopt_orphans
    from cluster.fleet import NodeSpec
    from cluster.placement import NODE_LABEL

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    adopt_orphans()
    directory = Path(tempfile.mkdtemp(prefix="mobula-", dir="/tmp"))  # Sockets' paths must be short.
    local = None
    try:
        local = LocalRay([NodeSpec(name="local", cpus=os.cpu_count() or 1)], NODE_LABEL, directory)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own in place.
        yield
    finally:
        if local is not None:
            local.stop()
        shutil.rmtree(directory, ignore_errors=True)


def refuse_unwritable(path: Path | None, option: str) -> None:
    """Before anything is run for it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise InvalidConfig(f"{option} {path}: there is no directory {path.absolute().parent}")
