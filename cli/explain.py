"""`mobula explain`: why the controller did what it did, and what would have turned it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cli.figures import figure
from cli.journals import FleetName, JournalFile, home_of, opened
from cli.patience import patience
from cli.times import clock, spell, until
from cluster.errors import InvalidConfig, InvalidRequest

if TYPE_CHECKING:
    from controller.explanation import Answer, GroupAnswer, Step
    from controller.journal import Journal
    from policies.counterfactual import Flip

MOST_STEPS = 8  # Of one group; all of them are in --json.
MOST_NUMBERS_IN_LINE = 4
EVERY_DIGIT = 15  # Of a stated turning point: rounded, it might not turn.
SUFFIXES = {"rps": "requests/s", "tokens": "tokens", "s": "s"}
COUNTS = ("needed", "enough", "wanted", "low", "high", "short", "spare", "prefill", "decode", "prefill_before", "decode_before")
"""Of the policies' numbers, those that count replicas."""


def explain(
    subject: Annotated[
        str | None,
        typer.Argument(metavar="SUBJECT", help="A replica, role, group or node: the last pass that did something about it."),
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="The pass in force then: ISO 8601, HH:MM[:SS], or -5m for ago.")
    ] = None,
    number: Annotated[int | None, typer.Option("--pass", metavar="N", help="The pass of this number.", min=0)] = None,
    request: Annotated[
        str | None, typer.Option("--request", metavar="ID", help="Why a request went where it did, from the gateway's log.")
    ] = None,
    fleet: FleetName = None,
    journal: JournalFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Say why: the reason, its numbers, the runner-up, what was dropped, and what would have turned it.

    Without more, of the last change. A stated turning point is true: deciding again with it gives what is stated, with 99 % of the
    way there it does not.

    Examples:

    mobula explain

    mobula explain --at 03:12

    mobula explain decode --at -2h

    mobula explain decode-h100-7

    mobula explain --request req-4f1c
    """
    if request is not None:
        if subject is not None or at is not None or number is not None or journal is not None:
            raise InvalidConfig("--request stands alone: a request is in the gateway's log, not in the journal")
        from cli.explain_request import explain_request

        explain_request(request, home_of(fleet), as_json=as_json)
        return
    if at is not None and number is not None:
        raise InvalidConfig("--at and --pass name two passes; give one")
    from controller.explanation import explain as answer_of

    now_s = time.time()
    with opened(fleet, journal) as source:
        until_s = None if at is None else until(at, now_s, "--at")
        chosen = choose(source, subject, until_s, now_s) if number is None else number
        with patience("deciding again") as told:
            answer = answer_of(source, chosen, subject, told=told)
        hint = "" if any(group.actions for group in answer.groups) else whence(source, answer, subject)
    if as_json:
        typer.echo(msgspec.json.encode(answer))
    else:
        Console(highlight=False).print(shown(answer, now_s, hint))


def choose(journal: Journal, subject: str | None, until_s: float | None, now_s: float) -> int:
    """The pass to explain. Raises InvalidRequest where the journal has none."""
    span = journal.span
    if span is None:
        raise InvalidRequest("the journal is empty: no pass was made yet")
    latest_s = span[1] if until_s is None else until_s
    if until_s is not None and until_s >= now_s + 1.0:
        raise InvalidRequest(f"--at {clock(latest_s, now_s)} is yet to come")
    in_force = journal.at(latest_s)
    if in_force is None:
        raise InvalidRequest(f"--at {clock(latest_s, now_s)} is before {clock(span[0], now_s)}, the journal's first pass")
    if subject is not None:
        touched = journal.last_touch(subject, latest_s)
        return in_force if touched is None else touched
    if until_s is not None:
        return in_force
    changed = journal.last_change()
    return in_force if changed is None else changed


def whence(journal: Journal, answer: Answer, subject: str | None) -> str:
    """Where to look further from a pass in which nothing was done."""
    about = "" if subject is None else f" about {subject}"
    before = journal.last_change(answer.at_s) if subject is None else journal.last_touch(subject, answer.at_s)
    if before is None:
        return f"Nothing was done{about} in this pass, nor in any before it."
    return f"Nothing was done{about} in this pass.\nThe last change before it: mobula explain --pass {before}"


def shown(answer: Answer, now_s: float, hint: str = "") -> RenderableType:
    """An answer to read, and after it a hint."""
    head = Text(f"Pass {answer.number}", style="bold")
    head.append(f" at {clock(answer.at_s, now_s)}, {spell(now_s - answer.at_s)} ago, epoch {answer.epoch}", style="not bold")
    if answer.mode == "advise":
        head.append(", advised only: nothing is carried out", style="not bold yellow")
    parts: list[RenderableType] = [head]
    if answer.failed:
        parts.append(Text(f"This pass did nothing: {answer.failed}", style="red"))
    for group in answer.groups:
        parts += [Text(""), _title(group), Padding(_body(group, answer, now_s), (0, 0, 0, 2))]
    if hint:
        parts += [Text(""), Text(hint, style="dim")]
    return Group(*parts)


def _title(group: GroupAnswer) -> Text:
    from policies.counterfactual import replicas

    title = Text(group.group, style="bold cyan")
    change = f"stays at {replicas(group.after)}" if group.before == group.after else f"{group.before} -> {replicas(group.after)}"
    title.append(f"  {change}", style="not bold default")
    if group.present != group.before:
        title.append(f"  ({group.present} of {group.before} were there)", style="not bold yellow")
    return title


def _body(group: GroupAnswer, answer: Answer, now_s: float) -> Table:
    """One line a fact, its name on the left."""
    body = Table.grid(padding=(0, 2))
    body.add_column(style="dim", no_wrap=True)
    body.add_column(overflow="fold")
    body.add_row("why", Text(_why(group)))
    if group.present < group.before and group.missing:
        body.add_row("lost", Text(", ".join(group.missing)))
    if group.numbers:
        body.add_row("numbers", _numbers(group.numbers, now_s))
    if group.runner_up:
        body.add_row("runner-up", Text(group.runner_up))
    if group.actions:
        body.add_row("actions", _steps(group))
    if group.dropped:
        lines = (f"{one.proposal}: {one.why} ({one.by})\n  proposed because {one.reason}" for one in group.dropped)
        body.add_row("dropped", Text("\n".join(lines)))
    if not answer.failed:
        body.add_row("would turn", _flips(group, answer.number))
    return body


def _why(group: GroupAnswer) -> str:
    if group.before == group.after and group.present < group.before and group.actions:
        return f"{group.before - group.present} of {group.before} were missing; the target stays, since {group.why}"
    return group.why


def _numbers(numbers: Mapping[str, float], now_s: float) -> Table:
    """Two pairs a line."""
    grid = Table.grid(padding=(0, 2))
    for _ in range(2):
        grid.add_column()
        grid.add_column(justify="right")
    cells = [cell for name, value in numbers.items() for cell in quantity(name, value, now_s)]
    for start in range(0, len(cells), MOST_NUMBERS_IN_LINE):
        grid.add_row(*(Text(cell) for cell in cells[start : start + MOST_NUMBERS_IN_LINE]))
    return grid


def quantity(name: str, value: float, now_s: float) -> tuple[str, str]:
    """A number of a reason: its name in words, and its value with its unit."""
    words, _, suffix = name.rpartition("_")
    if name == "expires_s":
        return "until", clock(value, now_s)
    if words and suffix in SUFFIXES:
        return words.replace("_", " "), f"{figure(value)} {SUFFIXES[suffix]}"
    unit = "" if name not in COUNTS else " replica" if value == 1 else " replicas"
    return name.replace("_", " "), f"{figure(value)}{unit}"


def _steps(group: GroupAnswer) -> Text:
    lines = [_step(step, group) for step in group.actions[:MOST_STEPS]]
    more = len(group.actions) - MOST_STEPS
    return Text("\n".join([*lines, f"and {more} more, all of them with --json"] if more > 0 else lines))


def _step(step: Step, group: GroupAnswer) -> str:
    took = "" if step.took_s is None or " after " in step.became else f" after {spell(step.took_s)}"
    own = "" if step.why == group.why else f" ({step.why})"
    return f"{step.action}: {step.became}{took}{own}"


def _flips(group: GroupAnswer, number: int) -> RenderableType:
    if not group.sought:
        return Text(f"is looked for by `mobula explain {group.group} --pass {number}`")
    if not group.flips and not group.unturned:
        return Text("no measured number: it does not hang on any")
    parts: list[RenderableType] = []
    if group.flips:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(overflow="fold")
        for justify in ("right", "left", "left", "right"):
            grid.add_column(justify=justify, no_wrap=True)
        grid.add_column(overflow="fold")
        for flip in group.flips:
            stated = f"{figure(flip.turns_at, EVERY_DIGIT)} {flip.unit}"
            grid.add_row(Text(_own(flip.lever, group)), _was(flip), "->", stated, _change(flip), Text(f"gives {flip.outcome}"))
        parts.append(grid)
    if group.unturned:
        from policies.counterfactual import REACH

        names = ", ".join(_own(lever, group) for lever in group.unturned)
        parts.append(Text(f"not {names}, {REACH:g} times more or less", style="dim"))
    if group.window_s:
        parts.append(Text(f"demand and lengths are means over the last {spell(group.window_s)}", style="dim"))
    return Group(*parts)


def _own(lever: str, group: GroupAnswer) -> str:
    """A lever's name, without saying whose it is where it is the group's own."""
    kind, _, name = lever.partition(" of ")
    return kind if name == group.group or group.group.startswith(f"{name}/") else lever


def _change(flip: Flip) -> str:
    share = flip.turns_at / flip.was - 1
    return f"({share:+.0%})" if abs(share) >= 0.01 else f"({share:+.2%})"


def _was(flip: Flip) -> str:
    """To as many digits as the turning point has, and one more."""
    digits = len(f"{flip.turns_at:.15g}".replace(".", "").strip("0"))
    return figure(flip.was, max(4, digits + 1))
