"""`mobula reproduce`: published systems measured again, in one table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from cluster.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from rich.table import Table

    from reproductions.row import Row

COLOURS = {"within": "green", "outside": "red", "not reproducible": "yellow"}


def reproduce(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Which systems; see --list.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
    quick: Annotated[bool, typer.Option(help="Fewer and shorter runs: rough values, marked as such.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Name the systems, and stop.")] = False,
    seed: Annotated[int, typer.Option(help="Of all random streams.", min=0)] = 0,
    prefill_cost: Annotated[float, typer.Option(metavar="X", help="Stretch all prefill times: do predictions move?")] = 1.0,
) -> None:
    """Measure published systems again and set our numbers beside theirs.

    Each row gives the claim, the setting, what was published, what we find, and whether that is predicted or an input. A run that
    is interrupted still shows the rows it has.

    Examples:

    mobula reproduce --all --quick

    mobula reproduce splitwise --json
    """
    from rich.console import Console

    from reproductions import walk

    if listing:
        for name, module in walk.found().items():
            typer.echo(f"{name}: {(module.__doc__ or '').strip().splitlines()[0]}")
        return
    if every == bool(names):
        raise InvalidConfig("name the systems to reproduce, or give --all" + (", not both" if every else ""))
    rows: list[Row] = []
    try:
        _measure(walk.found() if every else walk.named(names or ()), rows, quick, seed, prefill_cost)
    finally:
        if as_json:
            typer.echo(encoded(rows))
        elif rows:
            Console(highlight=False).print(shown(rows))


def _measure(modules: dict[str, ModuleType], rows: list[Row], quick: bool, seed: int, prefill_cost: float) -> None:
    """Adds to `rows` as they come, and shows on stderr what is being done."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from reproductions import walk
    from reproductions.settings import Settings, found_data

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        "{task.fields[system]}",
        TextColumn("{task.description}"),
        "{task.completed} rows",
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=None, system="")
        settings = Settings(
            data_dir=found_data(),
            quick=quick,
            seed=seed,
            prefill_cost=prefill_cost,
            tell=lambda words: progress.update(task, description=words),
        )
        for name, module in modules.items():
            progress.update(task, system=name, description="")
            for row in walk.reproduced(module, settings):
                rows.append(row)
                progress.advance(task)


def encoded(rows: Sequence[Row]) -> bytes:
    """Every field of every row, and its verdict; a bound at infinity is null."""
    return msgspec.json.encode({"rows": [_plain(row) for row in rows]})


def _plain(row: Row) -> dict[str, object]:
    fields = {name: None if value in (math.inf, -math.inf) else value for name, value in msgspec.structs.asdict(row).items()}
    return {**fields, "verdict": row.verdict}


def shown(rows: Sequence[Row]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from cli.figures import figure

    rough = " (quick: cut short, values are rough)" if any(row.quick for row in rows) else ""
    table = Table(box=box.SIMPLE_HEAD, title=f"Published systems, measured again{rough}", title_justify="left", show_lines=False)
    for heading in ("system", "claim", "setting", "published"):
        table.add_column(heading, overflow="fold")
    table.add_column("ours", justify="right")
    table.add_column("label")
    table.add_column("verdict", overflow="fold")
    table.add_column("s", justify="right")
    system = None
    for row in rows:
        if system not in (None, row.system):
            table.add_section()
        ours = "-" if row.ours is None else f"{figure(row.ours, 3)} {row.unit}".strip()
        verdict = Text(row.verdict, style=COLOURS[row.verdict]).append(f" ({row.tolerance})" if row.tolerance else "", style="dim")
        verdict.append(f": {row.why}" if row.why else "", style="default")
        shown_system = "" if row.system == system else row.system
        table.add_row(shown_system, row.claim, row.setting, row.published, ours, row.label, verdict, f"{row.seconds:.0f}")
        system = row.system
    return table
