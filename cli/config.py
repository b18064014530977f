"""`mobula config`: what a cluster.yaml comes to, and what of it a running fleet can take over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.ask import ask
from cli.fleet_home import FleetHome
from cluster.errors import InvalidConfig
from cluster.fleet import ControlSpec, Fleet, Pace
from cluster.node import Market
from cluster.placement import group_of, limits_of, slots_of
from controller.config import as_yaml, check_fleet, effective, load_fleet
from controller.pipelines import build
from controller.reload import Difference, check_reload, differences, shown
from gateway.keys import read_keys
from policies.pipeline import name_of

app = typer.Typer(help="Check, show, compare and reload a cluster.yaml.", no_args_is_help=True, add_completion=False)

File = Annotated[Path, typer.Option("--file", "-f", help="A cluster.yaml.")]
FleetName = Annotated[str | None, typer.Option("--fleet", metavar="NAME", help="By default the one that the file names.")]
AsJson = Annotated[bool, typer.Option("--json", help="For scripts.")]


@app.command()
def check(
    file: File = Path("cluster.yaml"),
    joined: Annotated[bool, typer.Option("--joined", help="For `up --address`: not measured by this machine.")] = False,
) -> None:
    """Check all that `mobula up` would, and sum up what it would start. Nothing is started.

    Example: mobula config check -f cluster.yaml
    """
    fleet = load_fleet(file)
    running = _is_up(FleetHome(fleet.name))
    check_fleet(file, fleet, here=not joined, running=running)
    if fleet.gateway.keys_file is not None:
        read_keys(fleet.gateway.keys_file)
    console = Console()
    console.print(groups_table(fleet))
    console.print(pools_table(fleet))
    _print_pipelines(fleet.control, console)
    taken = f", but for its ports and memory, which the running {fleet.name} has" if running else ""
    console.print(f"{file}: all is possible{taken}", style="green", markup=False, soft_wrap=True)


@app.command()
def show(
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A cluster.yaml.")] = None,
    fleet: Annotated[str | None, typer.Option("--fleet", metavar="NAME", help="A running fleet, instead of a file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of YAML.")] = False,
) -> None:
    """Print the config with every default spelled out, those of policies included: a cluster.yaml again.

    Examples:

    mobula config show -f cluster.yaml

    mobula config show --fleet demo --json
    """
    if (file is None) == (fleet is None):
        raise InvalidConfig("give --file or --fleet, one of them: whose config is to be shown")
    found = load_fleet(file) if file is not None else ask(FleetHome(fleet or ""), "fleet", Fleet)
    whole = effective(found)
    typer.echo(msgspec.json.encode(whole) if as_json else as_yaml(whole).rstrip())


@app.command()
def diff(file: File = Path("cluster.yaml"), fleet: FleetName = None, as_json: AsJson = False) -> None:
    """Show what of a file differs from the running fleet, and which of it can change while it runs.

    Examples:

    mobula config diff -f cluster.yaml

    mobula config diff -f cluster.yaml --fleet demo --json
    """
    new = load_fleet(file)
    home = FleetHome(fleet or new.name)
    found = differences(ask(home, "fleet", Fleet), new)
    if as_json:
        rows = [{**msgspec.structs.asdict(difference), "live": difference.live} for difference in found]
        typer.echo(msgspec.json.encode(rows))
    else:
        console = Console()
        _print_differences(found, file, home, console)
        _print_verdict(found, console)


@app.command()
def reload(file: File = Path("cluster.yaml"), fleet: FleetName = None) -> None:
    """Have the running fleet take over a file, all of it or, where something cannot be, nothing.

    Example: mobula config reload -f cluster.yaml
    """
    with _unchanged(fleet):
        new = load_fleet(file)
    home = FleetHome(fleet or new.name)
    old = ask(home, "fleet", Fleet)
    with _unchanged(home.path.name):
        check_fleet(file, new, here=_is_local(home), running=True)
        found = differences(old, new)
        _print_differences(found, file, home, Console())
        check_reload(old, new)
    if found:
        changed = ask(home, "reload", list[str], fleet=msgspec.to_builtins(new))
        typer.echo(f"fleet {home.path.name} has changed {len(changed)} setting{'s' * (len(changed) != 1)}")


@contextlib.contextmanager
def _unchanged(fleet: str | None) -> Iterator[None]:
    """Whatever is wrong with a file, the fleet runs on with the one it has."""
    try:
        yield
    except InvalidConfig as error:
        raise InvalidConfig(f"{error}; {f'fleet {fleet}' if fleet else 'the fleet'} is as it was") from error


def groups_table(fleet: Fleet) -> Table:
    """How many of what."""
    table = _table("groups", ("group", "engine", "plays"), ("start", "min", "max"))
    for group in fleet.replicas:
        numbers = (group.count, *limits_of(group))
        _add(table, group_of(fleet, group), group.engine, _played(group.pace), *map(str, numbers))
    return table


def pools_table(fleet: Fleet) -> Table:
    """What there is to run them on; prices are of all nodes of a pool."""
    table = _table("pools", ("pool", "nodes", "market", "zones"), ("slots", "min", "max", "$/h"))
    for pool in dict.fromkeys(node.pool for node in fleet.nodes):
        nodes = [node for node in fleet.nodes if node.pool == pool]
        limits = [limits_of(group) for group in fleet.replicas if group.pool == pool]
        spot = any(node.market is Market.SPOT for node in nodes)
        _add(
            table,
            pool,
            f"{len(nodes)} x {_each(node.accelerator for node in nodes)}",
            Text(_each(node.market.value for node in nodes), "yellow" if spot else ""),
            _each(node.zone or "-" for node in nodes),
            str(sum(slots_of(fleet, node) for node in nodes)),
            str(sum(low for low, _ in limits)),
            str(sum(high for _, high in limits)),
            f"{sum(node.price_usd_per_hour for node in nodes):.2f}",
        )
    return table


def differences_table(found: Sequence[Difference]) -> Table:
    """Green where a change can be made while the fleet runs."""
    table = _table("", ("setting", "of", "running", "file", "live"), ())
    for one in found:
        live = Text("yes", "green") if one.live else Text("no", "red")
        _add(table, one.path, one.of, Text(shown(one.old), "dim"), shown(one.new), live)
    return table


def _print_differences(found: Sequence[Difference], file: Path, home: FleetHome, console: Console) -> None:
    if found:
        console.print(differences_table(found))
    else:
        console.print(f"{file} is what fleet {home.path.name} runs with", markup=False, soft_wrap=True)


def _print_verdict(found: Sequence[Difference], console: Console) -> None:
    fixed = sum(not one.live for one in found)
    if fixed:
        console.print(f"{fixed} of {len(found)} need `mobula down` and `mobula up`", style="red", markup=False)
    elif found:
        console.print("all can change while it runs: `mobula config reload`", style="green", markup=False)


def _print_pipelines(control: ControlSpec, console: Console) -> None:
    for title, spec in (("decides", control.pipeline), *control.challengers.items()):
        pipeline = build(spec)
        first = sorted(pipeline.policies, key=lambda policy: not policy.emergency)
        policies = ", ".join(name_of(policy) + " (emergency)" * policy.emergency for policy in first)
        guards = ", ".join(map(name_of, pipeline.guards))
        console.print(f"{title}: {policies or 'no policy'}; guarded by {guards or 'nobody'}", highlight=False, markup=False)


def _is_up(home: FleetHome) -> bool:
    record = home.record()
    return record is not None and record.supervisor.find() is not None


def _is_local(home: FleetHome) -> bool:
    record = home.record()
    return record is None or record.address is None


def _played(pace: Pace | None) -> str:
    if pace is None:
        return "-"
    return f"{pace.shape} on {pace.accelerator}" + (f" x {pace.speedup:g}" if pace.speedup != 1.0 else "")


def _each(words: Iterable[str]) -> str:
    """Each once, in order."""
    return ", ".join(dict.fromkeys(words))


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for heading in left:
        table.add_column(heading, overflow="fold")
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _add(table: Table, *cells: str | Text) -> None:
    """What a file says is no markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
