"""The `mobula` command: names its subcommands, and imports the one that is called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from cluster.errors import MobulaError, Temporary

EXIT_PERMANENT = 2  # As for a wrong flag: the same command will fail again.
EXIT_TEMPORARY = 75  # EX_TEMPFAIL of sysexits.h.


class Subcommand(NamedTuple):
    target: str
    """module:attribute, a function or a Typer app."""
    summary: str


SUBCOMMANDS = {
    "up": Subcommand("cli.up:up", "Start what cluster.yaml describes."),
    "down": Subcommand("cli.down:down", "Stop what `up` started, and nothing else."),
    "status": Subcommand("cli.status:status", "Show replicas, their roles and load."),
    "config": Subcommand("cli.config:app", "Check, show, compare and reload a cluster.yaml."),
    "explain": Subcommand("cli.explain:explain", "Say why the controller did what it did, and what would have turned it."),
    "journal": Subcommand("cli.journal:app", "List what was decided, or decide it all again."),
    "compare": Subcommand("cli.compare:compare", "Set challengers' decisions beside those that were carried out."),
    "pause": Subcommand("cli.hands:pause", "Stop scaling for a while; what is lost is still replaced."),
    "resume": Subcommand("cli.hands:resume", "End a pause."),
    "cordon": Subcommand("cli.hands:cordon", "Start nothing new on a node."),
    "uncordon": Subcommand("cli.hands:uncordon", "End a node's cordon or drain."),
    "drain": Subcommand("cli.hands:drain", "Move everything off a node."),
    "pin": Subcommand("cli.hands:pin", "Keep a group at a number of replicas."),
    "unpin": Subcommand("cli.hands:unpin", "End a group's pin."),
    "replay": Subcommand("cli.replay:replay", "Send a trace to an OpenAI endpoint and report latencies."),
    "reproduce": Subcommand("cli.reproduce:reproduce", "Measure published systems again, in one table."),
    "calibrate": Subcommand("cli.calibrate:calibrate", "Measure a replica's step times and write them as a table."),
    "model": Subcommand("cli.model:app", "Make a small model, without a download."),
    "chaos": Subcommand("cli.chaos:app", "Break something of a local fleet on purpose."),
    "keys": Subcommand("cli.keys:app", "Add and list API keys."),
}


class LazyCommand(TyperCommand):
    """Stands in for a subcommand in help and completion; becomes the real one when called."""

    def __init__(self, name: str, subcommand: Subcommand) -> None:
        super().__init__(name, help=subcommand.summary)
        self._target = subcommand.target

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return _load(self._target).make_context(info_name, args, parent=parent, **extra)


class LazyGroup(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        subcommand = SUBCOMMANDS.get(cmd_name)
        return LazyCommand(cmd_name, subcommand) if subcommand else None


def _load(target: str) -> Any:
    found = _attribute(target)
    if not isinstance(found, typer.Typer):
        single = typer.Typer(add_completion=False)
        single.command()(found)
        found = single
    return typer.main.get_command(found)


def _attribute(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)


@app.callback()
def mobula() -> None:
    """Serve language models on a Ray cluster of mixed machines.

    Examples:

    - `mobula model init model --preset tiny-dense`

    - `mobula up -f cluster.yaml`

    - `mobula replay trace.csv --url http://127.0.0.1:8000`

    - `mobula down`
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run one command. An error of ours is one line on stderr and an exit code that says whether trying again makes sense."""
    try:
        app(args=args)
    except MobulaError as error:
        print(f"mobula: error: {error}", file=sys.stderr)
        sys.exit(EXIT_TEMPORARY if isinstance(error, Temporary) else EXIT_PERMANENT)


if __name__ == "__main__":
    main()
