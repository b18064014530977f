"""`mobula compare`: what challengers would have decided, beside what was."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cli.journals import FleetName, JournalFile, opened
from cli.times import clock, moment, spell
from cluster.errors import InvalidRequest

if TYPE_CHECKING:
    from controller.comparison import Comparison, Divergence, GroupComparison, Use
    from policies.pipeline import Pipeline

OPEN_LOOP = (
    "Every snapshot is one that the acting policy has led to: this is what challengers would have wanted there, "
    "not what would have come of following them."
)


def compare(
    since: Annotated[str | None, typer.Option("--since", metavar="TIME", help="ISO 8601, HH:MM[:SS], or -2h for ago.")] = None,
    other: Annotated[
        Path | None, typer.Option("--with", metavar="FILE", help="A cluster.yaml whose control.pipeline decides again.")
    ] = None,
    fleet: FleetName = None,
    journal: JournalFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Set challengers' decisions beside those of the policy that acts.

    Challengers are those of `control.challengers`, which decide in shadow; or, afterwards, another file's pipeline.

    Examples:

    mobula compare --since -1d

    mobula compare --with cautious.yaml --since 08:00
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from controller import comparison

    now_s = time.time()
    since_s = float("-inf") if since is None else moment(since, now_s, "--since")
    pipeline = None if other is None else pipeline_of(other)
    console = Console(stderr=True)
    columns = (TextColumn("comparing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with opened(fleet, journal) as source, Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        if other is None or pipeline is None:
            passes = comparison.recorded(source, since_s)
        else:
            passes = comparison.redecided(source, since_s, other.name, pipeline)
        found = comparison.compare(progress.track(passes, total=source.count(since_s)))
    if not found.passes:
        raise InvalidRequest("the journal has no pass" + ("" if since is None else f" since {clock(since_s, now_s)}"))
    if as_json:
        typer.echo(msgspec.json.encode(found))
    else:
        Console(highlight=False).print(shown(found, now_s))


def pipeline_of(path: Path) -> Pipeline:
    """Of a cluster.yaml. Raises InvalidConfig with its place."""
    from controller.config import load_fleet
    from controller.pipelines import build

    return build(load_fleet(path).control.pipeline, f"{path}: control.pipeline")


def shown(found: Comparison, now_s: float) -> RenderableType:
    """Fits 90 columns."""
    span = f"{found.passes} passes from {clock(found.since_s, now_s)} to {clock(found.until_s, now_s)}"
    head = Text(f"{span}, {spell(found.until_s - found.since_s)}", style="bold")
    if not found.groups:
        none = "No challenger decided in them: name some in control.challengers, or give another pipeline with --with FILE."
        return Group(head, Text(none))
    parts: list[RenderableType] = [head, Text(OPEN_LOOP, style="dim")]
    for challenger in dict.fromkeys(one.challenger for one in found.groups):
        parts += [Text(""), *_challenger(challenger, [one for one in found.groups if one.challenger == challenger], now_s)]
    return Group(*parts)


def _challenger(name: str, groups: list[GroupComparison], now_s: float) -> list[RenderableType]:
    table = Table(title=Text(name, style="bold cyan"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("group", overflow="fold")
    table.add_column("differs", justify="right", no_wrap=True)
    for heading in ("mean replicas", "replica-hours", "USD", "changes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in groups:
        table.add_row(Text(one.group), f"{one.differing / one.passes:.1%}", *_cells(one.acting, one.proposed))
    if len(groups) > 1:
        table.add_section()
        table.add_row("all", "", *_cells(_sum([one.acting for one in groups]), _sum([one.proposed for one in groups])))
    firsts = [line for one in groups if one.first is not None for line in _first(one.group, name, one.first, now_s)]
    return [table, *(firsts or [Text("It never differs.")])]


def _cells(acting: Use, proposed: Use) -> tuple[str, ...]:
    """Acting, then the challenger."""
    usd = f"{acting.usd:.2f} -> {proposed.usd:.2f}" if acting.usd or proposed.usd else "-"
    return (
        f"{acting.mean_replicas:.2f} -> {proposed.mean_replicas:.2f}",
        f"{acting.replica_hours:.2f} -> {proposed.replica_hours:.2f}",
        usd,
        f"{acting.changes} -> {proposed.changes}",
    )


def _sum(uses: list[Use]) -> Use:
    fields = type(uses[0]).__struct_fields__
    return type(uses[0])(**{field: sum(getattr(use, field) for use in uses) for field in fields})


def _first(group: str, challenger: str, first: Divergence, now_s: float) -> list[Text]:
    return [
        Text(f"{group} differs first in pass {first.number} at {clock(first.at_s, now_s)}"),
        Text(f"  acting: {first.acting}, since {first.acting_why}"),
        Text(f"  {challenger}: {first.challenger}, since {first.challenger_why}"),
    ]
