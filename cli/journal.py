"""`mobula journal`: what was decided and when, and whether it would be decided again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.journals import FleetName, JournalFile, opened
from cli.times import clock, moment
from cluster.actions import Action, ChangeRole, Decision, DrainReplica, ScaleRole, StartReplica

if TYPE_CHECKING:
    from controller.explanation import Difference
    from controller.journal import Choice

MOST_DIFFERENCES = 3
MOST_FIELDS = 5  # Of one difference.
MOST_NAMES = 2  # Of replicas in a line.
EXIT_DIFFERENT = 1

app = typer.Typer(help="List what was decided, or decide it all again.", no_args_is_help=True, add_completion=False)


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One pass, in a line."""

    number: int
    at_s: float
    what: str
    why: str
    advised: bool = False
    """Nothing of it was done."""
    times: int = 1
    """Passes in a row that decided the same; `number` is the last of them."""


@app.command("list")
def list_changes(
    since: Annotated[str | None, typer.Option("--since", metavar="TIME", help="ISO 8601, HH:MM[:SS], or -2h for ago.")] = None,
    last: Annotated[int, typer.Option("--last", metavar="N", help="At most so many passes, the latest.", min=1)] = 30,
    fleet: FleetName = None,
    journal: JournalFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array instead of a table.")] = False,
) -> None:
    """Show the passes that changed something, or advised to: when, what, and why.

    Examples:

    mobula journal list

    mobula journal list --since -2h --last 100
    """
    now_s = time.time()
    since_s = float("-inf") if since is None else moment(since, now_s, "--since")
    with opened(fleet, journal) as source:
        lines = list(_lines(source.changes(since_s, most=last)))
    if as_json:
        typer.echo(msgspec.json.encode(lines))
    elif not lines:
        typer.echo("no pass has changed anything" + ("" if since is None else f" since {clock(since_s, now_s)}"))
    else:
        Console(highlight=False).print(table(lines, now_s))


@app.command()
def replay(fleet: FleetName = None, journal: JournalFile = None) -> None:
    """Decide every pass again, with the policies and settings of its time, and compare.

    Exits with 0 where all agree, 1 on any difference, 2 for a journal or policies that this release does not know.

    Examples:

    mobula journal replay

    mobula journal replay --journal /backup/journal.sqlite
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from controller.explanation import replay as again

    console = Console(stderr=True)
    columns = (TextColumn("deciding again"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    passes = different = 0
    first: list[Difference] = []
    with opened(fleet, journal) as source, Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for _, difference in progress.track(again(source), total=source.count()):
            passes += 1
            if difference is not None:
                different += 1
                first += [difference] if len(first) < MOST_DIFFERENCES else []
    typer.echo(f"{passes} passes decided again: {passes - different} agree, {different} differ")
    for difference in first:
        typer.echo(f"pass {difference.number}:")
        for line in told(difference):
            typer.echo(f"  {line}")
    if different:
        raise typer.Exit(EXIT_DIFFERENT)


def table(lines: list[Line], now_s: float) -> Table:
    """Fits 80 columns."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    shown.add_column("time", no_wrap=True)
    shown.add_column("pass", justify="right", no_wrap=True)
    shown.add_column("what", overflow="fold", ratio=2)
    shown.add_column("why", overflow="fold", ratio=3)
    for line in lines:
        notes = ", ".join([*["advised"] * line.advised, *[f"{line.times} passes"] * (line.times > 1)])
        what = f"{line.what} ({notes})" if notes else line.what
        shown.add_row(clock(line.at_s, now_s), str(line.number), Text(what), Text(line.why))
    return shown


def what(actions: tuple[Action, ...]) -> str:
    """Actions in a line: starts by group, others by name."""
    starts: dict[str, int] = {}
    drains, others = [], []
    for action in actions:
        match action:
            case StartReplica():
                starts[action.group] = starts.get(action.group, 0) + 1
            case DrainReplica():
                drains.append(action.replica_id)
            case ChangeRole():
                others.append(f"{action.replica_id} becomes {action.role.value}")
            case ScaleRole():
                others.append(f"{action.group} to {action.replicas}")
    words = [f"start {count} of {group}" for group, count in starts.items()]
    if drains:
        more = f" and {len(drains) - MOST_NAMES} more" if len(drains) > MOST_NAMES else ""
        words.append(f"drain {', '.join(drains[:MOST_NAMES])}{more}")
    return "; ".join([*words, *others])


def why(decision: Decision) -> str:
    """The reasons of all that was done, each once."""
    return "; ".join(dict.fromkeys(_why(decision, action) for action in decision.actions))


def _why(decision: Decision, action: Action) -> str:
    """A start for a target that stays is for one that was lost, whatever the reason for the target."""
    if isinstance(action, StartReplica) and action.reason.numbers.get("wanted") == decision.targets.get(action.group):
        return "the target stays, and what is missing is replaced"
    return action.reason.text


def told(difference: Difference) -> list[str]:
    """The first fields in which two decisions differ."""
    recorded, again = msgspec.json.decode(difference.recorded), msgspec.json.decode(difference.again)
    fields = list(islice(_apart("", recorded, again), MOST_FIELDS + 1))
    return [*fields[:MOST_FIELDS], *(["..."] if len(fields) > MOST_FIELDS else [])]


def _apart(place: str, recorded: Any, now: Any) -> Iterator[str]:
    if isinstance(recorded, dict) and isinstance(now, dict):
        for key in sorted({*recorded, *now}):
            yield from _apart(f"{place}.{key}".removeprefix("."), recorded.get(key), now.get(key))
    elif isinstance(recorded, list) and isinstance(now, list) and len(recorded) == len(now):
        for index, (one, other) in enumerate(zip(recorded, now, strict=True)):
            yield from _apart(f"{place}[{index}]", one, other)
    elif isinstance(recorded, list) and isinstance(now, list):
        yield f"{place}: {len(recorded)} were recorded, {len(now)} now"
    elif recorded != now:
        yield f"{place}: {recorded!r} was recorded, {now!r} now"


def _lines(changes: list[Choice]) -> Iterator[Line]:
    """Passes in a row that decided the same are one line: what is only advised is advised again each second, under other names."""

    def alike(choice: Choice) -> tuple[str, str, bool, tuple[str, ...]]:
        advised = choice.mode == "advise"
        names = () if advised else tuple(action.words for action in choice.decision.actions)
        return what(choice.decision.actions), why(choice.decision), advised, names

    for (done, reason, advised, _), same in groupby(changes, alike):
        row = list(same)
        yield Line(number=row[-1].number, at_s=row[-1].at_s, what=done, why=reason, advised=advised, times=len(row))
