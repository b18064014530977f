"""`mobula ab`: two policy sets on paired seeds, which is better in what, and the better one as a config."""

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
    TraceText,
    WarmUp,
    WorldFile,
    carry_out,
    case_of,
    kept,
    outcomes,
    refuse_unwritable,
    traffic_of,
)
from cli.sweep import spread
from cluster.errors import InvalidConfig

if TYPE_CHECKING:
    from cluster.fleet import Fleet
    from simulator.paired import Comparison


def ab(
    trace: TraceText,
    a: Annotated[Path, typer.Argument(metavar="A.yaml", help="The fleet as it is.")],
    b: Annotated[Path | None, typer.Argument(metavar="B.yaml", help="The same with other policies.")] = None,
    challenger: Annotated[
        str | None, typer.Option(metavar="NAME", help="B is this one of A's control.challengers, instead of a file.")
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Pairs of runs.", min=2)] = 5,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the winner's cluster.yaml; A's where none wins.")
    ] = None,
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
    """Set two policy sets against each other: the same arrivals and the same draws of the world in both runs of a pair.

    The winner is who is better in attainment by more than a tenth of a point; else, where attainment is alike to a point, who is
    cheaper per token; else who takes less energy; each only where the 95 % interval of the paired differences excludes zero.

    Examples:

    mobula ab conv.csv now.yaml next.yaml --minutes 20 --seeds 8 --export winner.yaml

    mobula ab "poisson:rate=8,minutes=10,prompt=fixed(800),output=fixed(150)" cluster.yaml --challenger cautious
    """
    from controller.config import as_yaml
    from simulator.case import check_case
    from simulator.digest import key_of
    from simulator.paired import challenged, compared, other_differences, words
    from simulator.sweep import over_seeds

    if (b is None) == (challenger is None):
        raise InvalidConfig("give B.yaml or --challenger: one of the two")
    refuse_unwritable(export, "--export")
    traffic = traffic_of(trace, start, minutes, scale_rate, scale_prompt, scale_output)
    of_a = case_of(a, world, traffic, warm_up)
    if b is not None:
        of_b, name = case_of(b, world, traffic, warm_up), str(b)
    else:
        assert challenger is not None
        of_b, name = msgspec.structs.replace(of_a, fleet=challenged(of_a.fleet, challenger, str(a))), challenger
    console, sides = Console(stderr=True), {"A": over_seeds(of_a, seeds), "B": over_seeds(of_b, seeds)}
    if differing := other_differences(of_a.fleet, of_b.fleet):
        _say(console, f"not policies alone are compared: A and B differ in {', '.join(differing)}, too")
    for cases in sides.values():
        check_case(cases[0])
    with kept(out) as store:
        named = {key_of(case): (f"{side}, seed {case.seed}", case) for side, cases in sides.items() for case in cases}
        try:
            failed = carry_out(named, store, address, console)
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        pairs = list(zip(*(outcomes(cases, store) for cases in sides.values()), strict=True))
    found = compared([(one, other) for one, other in pairs if one is not None and other is not None])
    if export is not None:
        export.write_text(as_yaml(_winner(found, of_a.fleet, of_b.fleet)))
    if as_json:
        typer.echo(msgspec.json.encode({"a": str(a), "b": name, **msgspec.to_builtins(found), "verdict": words(found)}))
    else:
        Console(highlight=False).print(table(found, str(a), name), f"{words(found)}.", _verdict(found), sep="\n")
    if export is not None:
        _say(console, f"{found.winner or 'A'} is written to {export}")
    if failed:
        raise typer.Exit(1)


def _winner(found: Comparison, a: Fleet, b: Fleet) -> Fleet:
    """Whole. Where a challenger wins it acts from then on, and is a challenger no more."""
    from simulator.paired import winning

    return winning(b if found.winner == "B" else a)


def table(found: Comparison, a: str, b: str) -> Table:
    """A row for each metric."""
    from simulator.outcome import METRICS

    shown = Table(
        title=f"A is {a}, B is {b}: {found.pairs} pairs", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False,
        caption="mean +- 95 %; TTFT and TPOT at P90", caption_justify="left",
    )  # fmt: skip
    for heading in ("metric", "A", "B", "B - A", "better"):
        shown.add_column(heading, justify="left" if heading == "metric" else "right")
    metrics = {metric.field: metric for metric in METRICS}
    for one in found.differences:
        metric = metrics[one.metric]
        cells = [spread(side, metric.scale).replace("\n", " ").replace("+-", "+- ") for side in (one.a, one.b, one.difference)]
        shown.add_row(metric.heading, *cells, one.better or ("same" if one.alike else "not shown"))
    return shown


def _verdict(found: Comparison) -> str:
    from simulator.outcome import METRICS

    if found.undecided is not None:
        low, high = (100 * bound for bound in found.undecided)
        return f"No winner yet: B's attainment may be {low:.2g} to {high:.2g} points above A's; more --seeds would tell."
    if found.winner is None:
        return "No winner: neither is shown to be better in attainment, cost or energy."
    by = next(metric.words for metric in METRICS if metric.field == found.by)
    return f"The winner is {found.winner}, by {by}."


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
