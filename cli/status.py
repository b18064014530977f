"""`mobula status`: a fleet's replicas, as a table that may stay up to date."""

from __future__ import annotations

import socket
import time
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli.fleet_home import FleetHome, FleetStatus, ReplicaStatus, only_fleet
from cluster.errors import Unreachable

ANSWER_S = 5.0
REFRESH_S = 1.0
MAX_ANSWER_BYTES = 16 * 2**20  # Ten thousand replicas are 4 MB.
PHASE_STYLES = {"ready": "green", "lost": "red", "draining": "yellow", "warming": "cyan", "starting": "cyan"}


def status(
    fleet: Annotated[str | None, typer.Argument(help="Name of the fleet; may be left out with only one up.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every second until Ctrl-C.")] = False,
) -> None:
    """Show a fleet's replicas: role, phase, process, load. `--json` has their metrics URLs, too.

    Examples:

    mobula status --watch

    mobula status demo --json
    """
    home = FleetHome(only_fleet(fleet))
    now = fetch(home)
    if as_json:
        typer.echo(msgspec.json.encode(now))
    elif watch:
        _watch(home, now)
    else:
        Console().print(table(now))


def fetch(home: FleetHome) -> FleetStatus:
    """Ask the supervisor. Raises Unreachable where there is none."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(ANSWER_S)
            client.connect(str(home.socket_path))
            with client.makefile("rb") as answer:
                return msgspec.json.decode(answer.read(MAX_ANSWER_BYTES), type=FleetStatus)
    except (OSError, msgspec.DecodeError) as error:
        raise Unreachable(f"fleet {home.path.name} {_why_silent(home, error)}") from error


def _why_silent(home: FleetHome, error: Exception) -> str:
    record = home.record()
    if record is None:
        return f"is not up: {home.record_path} is not there"
    if record.supervisor.find() is None:
        return f"has lost its supervisor; `mobula down {record.fleet}` ends what is left"
    if not home.socket_path.exists():
        return "is still starting"
    return f"does not answer at {home.socket_path}: {error}"


def table(now: FleetStatus) -> Table:
    """Fits 80 columns."""
    shown = Table(title=f"{now.fleet} at {now.url}", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for heading in ("replica", "role", "phase", "node", "pid"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("run", "wait", "KV", "step", "power"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for replica in sorted(now.replicas, key=lambda replica: (replica.role, replica.replica_id)):
        shown.add_row(*_cells(replica))
    return shown


def _cells(replica: ReplicaStatus) -> tuple[str | Text, ...]:
    """Of a replica whose worker says nothing, only what the registry knows."""
    known = (
        replica.replica_id,
        replica.role,
        Text(replica.phase, style=PHASE_STYLES.get(replica.phase, "")),
        replica.node,
    )
    if replica.pid is None:
        return (*known, *["-"] * 6)
    return (
        *known,
        str(replica.pid),
        str(replica.running),
        str(replica.waiting),
        f"{replica.kv_blocks_used / max(replica.kv_blocks, 1):.0%}",
        f"{1000 * replica.step_s:.1f} ms",
        f"{replica.power_w:.0f} W",
    )


def _watch(home: FleetHome, now: FleetStatus) -> None:
    try:
        with Live(table(now), refresh_per_second=4) as live:
            while True:
                time.sleep(REFRESH_S)
                live.update(table(fetch(home)))
    except KeyboardInterrupt:
        return
