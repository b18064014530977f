"""`mobula chaos`: break something of a local fleet on purpose, and see what becomes of it."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.ask import ask
from cli.fleet_home import FleetHome, only_fleet

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)

Fleet = Annotated[str | None, typer.Option("--fleet", help="Name of the fleet; may be left out with only one up.")]


@app.callback()
def chaos() -> None:
    """Break something of a local fleet on purpose: `mobula status --watch` beside it shows what becomes of it.

    Examples:

    - `mobula chaos kill node l4-b`

    - `mobula chaos kill controller`

    - `mobula chaos hang decode-l4-1 --for 20`

    - `mobula chaos slow decode-l4-0 3`
    """


@app.command()
def kill(
    what: Annotated[str, typer.Argument(help="worker, node, controller or gateway.")],
    target: Annotated[
        str, typer.Argument(help="Of a worker its id or a replica's, of a node its name; the first if left out.")
    ] = "",
    fleet: Fleet = None,
) -> None:
    """kill -9 a worker, all processes of a node, the controller, or a gateway replica."""
    _do(fleet, "kill", kind=what, target=target)


@app.command()
def hang(
    target: Annotated[str, typer.Argument(help="A worker's id or a replica's; the first if left out.")] = "",
    seconds: Annotated[float, typer.Option("--for", help="Seconds after which it goes on; 0: never.", min=0.0)] = 0.0,
    fleet: Fleet = None,
) -> None:
    """SIGSTOP a worker: it holds its streams and says nothing."""
    _do(fleet, "hang", target=target, seconds=seconds)


@app.command()
def slow(
    replica: Annotated[str, typer.Argument(help="A replica's id.")],
    factor: Annotated[float, typer.Argument(help="Times as long as its steps would last; 1 heals it.", min=1.0, max=1000.0)],
    fleet: Fleet = None,
) -> None:
    """Have a replica's steps last longer: a machine that throttles."""
    _do(fleet, "slow", target=replica, factor=factor)


@app.command("stop-prometheus")
def stop_prometheus(fleet: Fleet = None) -> None:
    """Stop the Prometheus that `telemetry.local_prometheus` started."""
    _do(fleet, "stop-prometheus")


def _do(fleet: str | None, what: str, **arguments: object) -> None:
    typer.echo(ask(FleetHome(only_fleet(fleet)), "chaos", str, what=what, **arguments))
