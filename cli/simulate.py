"""`mobula simulate`: a trace on the fleet of a cluster.yaml in simulated time, by the live policies, and the report of it."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.errors import InvalidConfig

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.fleet import Fleet
    from simulator.result import Result
    from simulator.simulation import Setup
    from simulator.world import World
    from workloads.stream import Workload

SILENT_S = 2.0  # What is done by then needs no progress bar.
FEW = "poisson:rate=2,minutes=0.1,prompt=fixed(64),output=fixed(8)"  # Enough for all that is compiled to be asked for.
EXIT_INTERRUPTED = 130  # As a shell says of a command that SIGINT ended.


def _option(panel: str, metavar: str | None, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, metavar=metavar, help=help, **more)


FLEET, TRACE, RESULTS = "Fleet", "Trace", "Results"


def simulate(
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE",
            help="Trace file (Azure LLM, Mooncake, BurstGPT, request log) or generator (poisson, gamma, steps, diurnal, sessions).",
        ),
    ],
    file: Annotated[Path, _option(FLEET, "FILE", "The cluster.yaml, as for `mobula up`.", "--file", "-f")] = Path("cluster.yaml"),
    world: Annotated[
        Path | None, _option(FLEET, "FILE", "YAML with what a cluster.yaml does not say: step times, delays, faults, spot losses.")
    ] = None,
    model: Annotated[str, _option(FLEET, "NAME", "That the trace asks for, of a fleet with several.")] = "",
    seed: Annotated[int, _option(FLEET, "N", "Of all chance, generators' too. The same seed gives the same results.")] = 0,
    control: Annotated[bool, _option(FLEET, None, "--no-control leaves the fleet as it starts.")] = True,
    start: Annotated[float, _option(TRACE, "MIN", "Minutes of the trace to skip.", min=0)] = 0.0,
    minutes: Annotated[float | None, _option(TRACE, "MIN", "Minutes to simulate; all by default.", min=0)] = None,
    scale_rate: Annotated[float, _option(TRACE, "X", "2 lets requests arrive twice as fast.", min=1e-6)] = 1.0,
    scale_prompt: Annotated[float, _option(TRACE, "X", "Factor for prompt lengths.", min=1e-6)] = 1.0,
    scale_output: Annotated[float, _option(TRACE, "X", "Factor for output lengths.", min=1e-6)] = 1.0,
    max_prompt_tokens: Annotated[int | None, _option(TRACE, "N", "Cut longer prompts, after scaling.", min=1)] = None,
    max_tokens: Annotated[int | None, _option(TRACE, "N", "Cut longer outputs, after scaling.", min=1)] = None,
    slo_ttft: Annotated[float | None, _option(RESULTS, "S", "Seconds to the first token, for class default.", min=0)] = None,
    slo_tpot: Annotated[float | None, _option(RESULTS, "S", "Seconds per token after the first, likewise.", min=0)] = None,
    warm_up: Annotated[float, _option(RESULTS, "S", "Requests of the first seconds do not count.", min=0)] = 60.0,
    as_json: Annotated[bool, _option(RESULTS, None, "All results as one JSON object, the last line.", "--json")] = False,
    report: Annotated[Path | None, _option(RESULTS, "FILE", "Write an HTML report, one file that needs no other.")] = None,
    parquet: Annotated[Path | None, _option(RESULTS, "FILE", "Write every request as a row of a Parquet file.")] = None,
) -> None:
    """Serve a trace in simulated time with the live router, admission and policies, and report what would have come of it.

    Nothing is started: neither models nor keys need be there. A trace file is read through first, and refused for a line that is
    broken or that no replica could serve. Exits with 0 however many requests were rejected, which the report says; 2 on bad
    input; 130 on Ctrl-C, which reports and writes what was found by then.

    Examples:

    mobula simulate azure_conv.csv -f cluster.yaml --report run.html

    mobula simulate conversation_trace.jsonl --scale-rate 2 --world world.yaml --parquet requests.parquet

    mobula simulate "poisson:rate=40,minutes=30,prompt=lognormal(1000,0.8),output=lognormal(200,0.6)" --seed 7 --json
    """
    import msgspec
    from rich.console import Console

    from controller.config import check_unstarted, load_fleet
    from simulator.world import World
    from simulator.world_file import load_world
    from workloads.reshape import Scale
    from workloads.stream import open_workload

    for option, path in (("--report", report), ("--parquet", parquet)):
        if path and not path.absolute().parent.is_dir():
            raise InvalidConfig(f"{option} {path}: there is no directory {path.absolute().parent}")
    fleet = _promising(load_fleet(file), slo_ttft, slo_tpot)
    check_unstarted(file, fleet)
    settings = load_world(world) if world else World()
    _check_together(file, fleet, world, settings)
    scale = Scale(
        prompt=scale_prompt, output=scale_output, rate=scale_rate, max_prompt_tokens=max_prompt_tokens, max_output_tokens=max_tokens
    )  # fmt: skip
    workload = open_workload(trace, seed=seed, start_s=60 * start, span_s=None if minutes is None else 60 * minutes, scale=scale)

    from simulator.simulation import Setup

    setup = Setup(fleet=fleet, world=settings, seed=seed, warm_up_s=warm_up, control=control, model=model, label=workload.words)
    console = Console(stderr=True)
    result = run(setup, workload, parquet, console)
    if parquet:
        _say(console, f"requests: {parquet}")
    if report:
        from simulator.report import write_report

        write_report(report, result, setup, command=shlex.join(["mobula", *sys.argv[1:]]))
        _say(console, f"report: {report}")
    if as_json:
        typer.echo(msgspec.json.encode(result))
    else:
        from simulator.summary import summary

        Console().print(summary(result))
    if result.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


def run(setup: Setup, workload: Workload, parquet: Path | None, console: Console) -> Result:
    """The simulation with its progress. Raises InvalidConfig and InvalidTrace before anything is simulated."""
    from simulator.compiled import compiled_before
    from simulator.look_through import look_through
    from simulator.machines import model_asked
    from simulator.simulation import Simulation
    from workloads.stream import open_workload

    span_s = workload.span_s
    if workload.read:
        with Progress("reading the trace", console) as progress:
            model = model_asked(setup.fleet, setup.model)
            span_s = look_through(
                workload, setup.fleet, model, lambda rows, share: progress.show(share, f"{rows:,} requests")
            ).span_s
    if span_s is not None and setup.warm_up_s > span_s:
        raise InvalidConfig(f"--warm-up {setup.warm_up_s:g} is above {span_s:g} s, the workload's length: no request would count")
    if not compiled_before():
        _say(console, "compiling the simulator, once: about a minute")
        Simulation(setup, iter(open_workload(FEW, seed=setup.seed))).run()
    with ExitStack() as stack:
        listeners: dict[str, Any] = {}
        if parquet:
            from simulator.requests_file import RequestsFile

            requests = stack.enter_context(RequestsFile(parquet))
            listeners = {"ended": requests.ended, "rejected": requests.rejected}
        progress = stack.enter_context(Progress("simulating", console))

        def tell(now_s: float, arrived: int) -> None:
            progress.simulated(now_s, arrived, workload.progress)

        return Simulation(setup, iter(workload), progress=tell, **listeners).run()


def _promising(fleet: Fleet, ttft_s: float | None, tpot_s: float | None) -> Fleet:
    """The fleet with these bounds of the default class, where they are given."""
    import msgspec

    from cluster.slo import Slo

    given = {name: bound for name, bound in (("ttft_s", ttft_s), ("tpot_s", tpot_s)) if bound is not None}
    default = msgspec.structs.replace(fleet.slo.get("default", Slo()), **given)
    return msgspec.structs.replace(fleet, slo={**fleet.slo, "default": default}) if given else fleet


def _check_together(file: Path, fleet: Fleet, world: Path | None, settings: World) -> None:
    """What the fleet's groups are in this world. Raises InvalidConfig naming the file at fault, or both."""
    from controller.config.reading import named
    from simulator.faults import check_faults
    from simulator.machines import check_slo, machines_of

    with named(file):
        machines = machines_of(fleet, settings)
        for name, slo in fleet.slo.items():
            check_slo(name, slo, machines)
    if world:
        with named(world):
            check_faults(fleet, settings)


class Progress:
    """A bar on a terminal for what takes longer than a moment: how far, how fast, and how long still."""

    def __init__(self, what: str, console: Console) -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            refresh_per_second=4,
        )
        self._what = what
        self._task = self._bar.add_task(what, total=1.0)
        self._began_s = time.monotonic()

    def show(self, share: float, words: str) -> None:
        """share: done, in [0, 1]."""
        self._bar.update(self._task, completed=share, description=f"{self._what}: {words}")
        if time.monotonic() - self._began_s > SILENT_S:
            self._bar.start()

    def simulated(self, now_s: float, arrived: int, share: float) -> None:
        """Told each simulated second."""
        from simulator.summary import clock

        took_s = max(time.monotonic() - self._began_s, 1e-3)
        self.show(share, f"{clock(now_s)}, {arrived:,} requests, {arrived / took_s:,.0f}/s")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
