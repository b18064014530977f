"""`mobula cheapest`: the cheapest fleet that serves a trace under its SLO."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich import box
from rich.console import Console, Group
from rich.table import Table

from cli.cases import (
    EXIT_INTERRUPTED,
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
    case_of,
    kept,
    progress_bar,
    refuse_unwritable,
    traffic_of,
)
from cli.figures import figure
from cluster.errors import InvalidConfig

if TYPE_CHECKING:
    from simulator.case import Case
    from simulator.cheapest import Answer, Trial
    from simulator.outcome import Outcome

MOST_SHOWN = 6  # Of the cheaper fleets that failed.


def cheapest(
    trace: TraceText,
    file: Annotated[
        Path, typer.Option("--file", "-f", help="The cluster.yaml whose groups, nodes, prices and SLO are meant.")
    ] = Path("cluster.yaml"),
    attainment: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Of the requests, to be inside their whole SLO; 0.99 because SLOs are judged by P99."),
    ] = 0.99,
    space: Annotated[Path | None, typer.Option(metavar="FILE", help="What may be tried beyond the file: replicas, nodes.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the world, and of a generator.")] = 0,
    export: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the fleet as a cluster.yaml.")] = None,
    start: Start = 0.0,
    minutes: Minutes = None,
    scale_rate: ScaleRate = 1.0,
    scale_prompt: ScalePrompt = 1.0,
    scale_output: ScaleOutput = 1.0,
    world: WorldFile = None,
    warm_up: WarmUp = 60.0,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Find the cheapest static fleet that serves a trace under its SLO, by simulating few of all there could be.

    Tried are all numbers of replicas of the file's groups, from 0 to their `max_replicas`, on the cheapest nodes that hold them. A
    space file widens or narrows that:

        replicas: {decode: [2, 12], prefill: [0, 4]}    # fewest and most, by group, or by role
        nodes: {a100: 8}                                # so many like the pool's first one

    Exits with 0; 2 on bad input and where no such fleet serves, saying what binds; 130 on Ctrl-C, and with --out it goes on later.

    Examples:

    mobula cheapest conv.csv -f cluster.yaml --minutes 20 --export cheapest.yaml

    mobula cheapest conv.csv -f cluster.yaml --space wide.yaml --attainment 0.95 --out outcomes
    """
    from controller.config import as_yaml
    from simulator.case import check_case, run
    from simulator.cheapest import Search
    from simulator.digest import key_of
    from simulator.space import Space, SpaceFile, load_space

    if not 0.0 < attainment < 1.0:
        raise InvalidConfig(f"--attainment {attainment} is outside (0, 1)")
    refuse_unwritable(export, "--export")
    traffic = traffic_of(trace, start, minutes, scale_rate, scale_prompt, scale_output)
    case = msgspec.structs.replace(case_of(file, world, traffic, warm_up), seed=seed)
    check_case(case)
    places = Space(case.fleet, SpaceFile() if space is None else load_space(space))
    console = Console(stderr=True)
    try:
        with kept(out) as store, progress_bar(console, None) as (progress, bar):

            def ask(case: Case, words: str) -> Outcome:
                key = key_of(case)
                progress.update(bar, description=words)
                found = store.get(key)
                if found is None:
                    found = run(case, lambda share: None)
                    store.add(key, words, found)
                progress.advance(bar)
                return found

            search = Search(case, places, attainment, ask)
            answer = search.answer()
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if export is not None:
        export.write_text(as_yaml(search.fleet()))
    if as_json:
        typer.echo(msgspec.json.encode(answer))
    else:
        Console(highlight=False).print(shown(answer))
    if export is not None:
        console.print(f"the fleet is written to {export}", markup=False, highlight=False, soft_wrap=True)


def shown(answer: Answer) -> Group:
    best = answer.best
    head = f"{best.words}, on {answer.nodes} nodes: {best.usd_per_hour:.2f} USD/h, {best.outcome.attainment:.2%} within the SLO"
    counted = (
        f"{answer.fleets} fleets: formulas exclude {answer.excluded}, {answer.dominated} have no more of anything than one that "
        f"failed, {answer.dearer} are no cheaper. Simulated: {answer.sliced} on the busiest slice, which refuses {answer.refused}; "
        f"{answer.whole} on the whole, {answer.stopped} of them not to the end."
    )
    parts = [head, counted, _table("One replica less or more; latencies at P90", answer.neighbours, best)]
    if answer.cheaper:
        parts.append(_table("Cheaper, and failing", answer.cheaper[:MOST_SHOWN], best))
    assumed = "With another replica no neighbour does worse, beyond noise."
    return Group(*parts, *(answer.surprises or [assumed]))


def _table(title: str, trials: list[Trial], best: Trial) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in ("fleet", "USD/h", "within", "TTFT ms", "TPOT ms", "missed by", ""):
        table.add_column(heading, justify="left" if heading in ("fleet", "missed by") else "right")
    for one in (best, *trials):
        outcome = one.outcome
        within = f"{outcome.attainment:.2%}" if not outcome.stopped else f"{outcome.outside} missed"
        latencies = ["-" if value is None else figure(1e3 * value, 3) for value in (outcome.ttft_p90_s, outcome.tpot_p90_s)]
        missed = ", ".join(f"{name} {count}" for name, count in outcome.missed.items() if count)
        verdict = (
            "the answer" if one is best else ("serves" if one.serves else "fails") + (", slice" if one.kind == "slice" else "")
        )
        table.add_row(one.words, f"{one.usd_per_hour:.2f}", within, *latencies, missed or "-", verdict)
    return table
