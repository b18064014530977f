"""`mobula sweep`: variants of a fleet, each simulated under several seeds, on all cores of a machine or a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cli.cases import (
    EXIT_INTERRUPTED,
    Address,
    AsJson,
    Minutes,
    Out,
    ScaleOutput,
    ScalePrompt,
    ScaleRate,
    Start,
    WarmUp,
    WorldFile,
    carry_out,
    case_of,
    kept,
    outcomes,
    traffic_of,
)
from cli.figures import figure
from cluster.errors import InvalidConfig

if TYPE_CHECKING:
    from simulator.case import Case
    from simulator.interval import Interval
    from simulator.sweep import Summary


def sweep(
    what: Annotated[
        list[str], typer.Argument(metavar="SWEEP.yaml | TRACE CLUSTER.yaml...", help="A sweep file; or a trace and fleets for it.")
    ],
    seeds: Annotated[int, typer.Option(metavar="N", help="Runs of each fleet; a sweep file says its own.", min=1)] = 5,
    start: Start = 0.0,
    minutes: Minutes = None,
    scale_rate: ScaleRate = 1.0,
    scale_prompt: ScalePrompt = 1.0,
    scale_output: ScaleOutput = 1.0,
    world: WorldFile = None,
    warm_up: WarmUp = 60.0,
    out: Out = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Simulate variants of a fleet under several seeds, as Ray tasks, and show each one's mean with its 95 % interval.

    With a sweep file, outcomes are kept beside it, in NAME.outcomes, unless --out says where. A sweep that was ended goes on from
    there. A sweep file:

        workload: {trace: conv.csv, minutes: 10, rate: 2.0}
        fleet: cluster.yaml
        seeds: 5
        variants:
          as it is: {}
          one more: {"fleet.replicas[0].count": 4, "fleet.replicas[0].max_replicas": 4}
          slow links: {world.link_bytes_per_s: 1.25e9}
          other: {fleet: other.yaml, workload.rate: 1.0, run.control: false}

    Exits with 0; 1 if any run failed; 2 on bad input; 130 on Ctrl-C.

    Examples:

    mobula sweep sweep.yaml

    mobula sweep conv.csv small.yaml large.yaml --minutes 10 --seeds 3 --out outcomes
    """
    from simulator.case import check_case
    from simulator.digest import key_of
    from simulator.sweep import check_size, load_sweep, over_seeds, summarise

    if len(what) == 1:
        variants, directory = load_sweep(Path(what[0])), out or Path(what[0]).with_suffix(".outcomes")
    else:
        traffic, directory = traffic_of(what[0], start, minutes, scale_rate, scale_prompt, scale_output), out
        variants = {_name(path, what): over_seeds(case_of(Path(path), world, traffic, warm_up), seeds) for path in what[1:]}
        check_size(variants)
    for cases in variants.values():
        check_case(cases[0])
    console, interrupted = Console(stderr=True), False
    with kept(directory) as store:
        named = {key_of(case): (f"{name}, seed {case.seed}", case) for name, cases in variants.items() for case in cases}
        try:
            failed = carry_out(named, store, address, console)
        except KeyboardInterrupt:
            interrupted, failed = True, {}
        found = {name: [one for one in outcomes(cases, store) if one is not None] for name, cases in variants.items()}
    summaries = [summarise(name, ended) for name, ended in found.items() if ended]
    if as_json:
        runs = {name: [msgspec.to_builtins(one) for one in ended] for name, ended in found.items()}
        typer.echo(msgspec.json.encode({"variants": summaries, "runs": runs, "interrupted": interrupted}))
    else:
        Console(highlight=False).print(table(summaries, variants))
    if interrupted or failed:
        raise typer.Exit(EXIT_INTERRUPTED if interrupted else 1)


def table(summaries: list[Summary], variants: dict[str, list[Case]]) -> Table:
    """A row for each variant of which something is known."""
    from simulator.outcome import METRICS

    shown = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption="mean +- 95 % over seeds; TTFT and TPOT at P90",
        caption_justify="left",
    )
    shown.add_column("variant", overflow="fold", min_width=10)
    shown.add_column("runs", justify="right")
    for metric in METRICS:
        shown.add_column(metric.heading, justify="right", max_width=9)
    for one in summaries:
        cells = [spread(one.metrics[metric.field], metric.scale) if metric.field in one.metrics else "-" for metric in METRICS]
        shown.add_row(one.variant, f"{one.runs}/{len(variants[one.variant])}", *cells)
    return shown


def spread(found: Interval, scale: float) -> str:
    """Mean and half width, in the metric's unit, one over the other."""
    mean = figure(found.mean * scale)
    return mean if found.half_width is None else f"{mean}\n+-{figure(round(found.half_width * scale, 5), 2)}"


def _name(path: str, what: list[str]) -> str:
    """The file's name, or its path where another has that name."""
    stems = [Path(other).stem for other in what[1:]]
    if what[1:].count(path) > 1:
        raise InvalidConfig(f"{path} is given {what[1:].count(path)} times")
    return Path(path).stem if stems.count(Path(path).stem) == 1 else path
