"""`mobula status`: a fleet as its controller sees it, as a table that may stay up to date."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli.ask import ask
from cli.fleet_home import FleetHome, only_fleet
from controller.status import Change, FleetStatus, GroupStatus, ModelStatus, NodeStatus, ReplicaStatus

REFRESH_S = 1.0
PHASE_STYLES = {"ready": "green", "lost": "red", "failed": "red", "draining": "yellow", "warming": "cyan", "starting": "cyan"}
GONE = ("lost", "failed", "stopped")
SHOWN_REPLICAS = 40  # More do not fit a screen; `--json` has all.
SHOWN_CHANGES = 5
FEWEST_REPLICAS = 3  # On however small a terminal.
NEVER_S = 1e9  # Ages are counted from 1970 where nothing was ever heard.


def status(
    fleet: Annotated[str | None, typer.Argument(help="Name of the fleet; may be left out with only one up.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every second until Ctrl-C.")] = False,
) -> None:
    """Show a fleet: models and their SLO, nodes, replicas by role and phase, load, power, cost, the last decisions and why.

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
        Console().print(screen(now))


def fetch(home: FleetHome) -> FleetStatus:
    """Ask the supervisor. Raises Unreachable where there is none."""
    return ask(home, "status", FleetStatus)


def screen(now: FleetStatus, most: int = SHOWN_REPLICAS) -> Group:
    """Fits 80 columns. most: replicas to show."""
    return Group(*_parts(now, most))


def fitted(now: FleetStatus, console: Console) -> Group:
    """A screen with no more replicas than leave room for the rest on the terminal."""
    rest = len(console.render_lines(screen(now, 0)))
    return screen(now, max(FEWEST_REPLICAS, min(SHOWN_REPLICAS, console.height - rest - 1)))


def _parts(now: FleetStatus, most: int) -> Iterator[RenderableType]:
    power = f", {now.power_w:,.0f} W" if now.power_w else ""
    cost = f", ${now.used_usd_per_hour:.2f}/h in use of ${now.price_usd_per_hour:.2f}/h" if now.price_usd_per_hour else ""
    yield Text(f"{now.fleet} at {now.url}: {now.mode}, pass {now.pass_number}, epoch {now.epoch}{power}{cost}", style="bold")
    if now.failures or now.unwritten:
        yield Text(f"{now.failures} passes failed, {now.unwritten} are not in the journal; see the controller's log", style="red")
    if now.nonsense:
        yield Text(f"{now.nonsense} load reports could not be and were left out; see the controller's log", style="red")
    for hold in now.holds:
        until = datetime.fromtimestamp(hold.expires_s).strftime("%H:%M")
        count = "" if hold.replicas is None else f" to {hold.replicas}"
        yield Text(f"{hold.kind} {hold.target}{count} by {hold.author} until {until}".replace("  ", " "), style="yellow")
    for model in now.models:
        if model.stale:
            yield Text(f"telemetry of {model.model} is {_age(model.age_s)}: its rate and latencies are unknown", style="red")
    yield _table("model", ("rate", "queued", "running", "TTFT P99", "TPOT P99", "in SLO"), map(_model, now.models))
    yield _table("group", ("ready", "wanted", "min", "max"), map(_group, now.groups))
    for held in now.held_back:
        yield Text(f"held back: {held.text}: {held.why} ({held.by})", style="yellow")
    yield _table("node", ("pool", "", "market", "zone", "used", "power", "$/h"), map(_node, now.nodes))
    yield replica_table(now, most)
    if now.changes:
        yield Text("last decisions (mobula explain says more)", style="dim")
    for change in now.changes[:SHOWN_CHANGES]:
        at = datetime.fromtimestamp(change.at_s).strftime("%H:%M:%S")
        yield Text(f"{at}  {'advised: ' if change.advised else ''}{change.text}: {change.reason}{_outcome(change)}")


def replica_table(now: FleetStatus, most: int = SHOWN_REPLICAS) -> Table:
    """The replicas alone; of too many, those that are no more are left out first."""
    kept = sorted(now.replicas, key=lambda replica: replica.phase in GONE)[:most]
    rows = sorted(kept, key=lambda replica: (replica.role, replica.replica_id))
    shown = _table("replica", ("role", "phase", "node", "run", "wait", "KV", "step", "power"), map(_replica, rows))
    if len(now.replicas) > most:
        shown.caption = f"and {len(now.replicas) - most} more"
    return shown


def _table(first: str, headings: tuple[str, ...], rows: Iterator[tuple[str | Text, ...]]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    left = {"role", "phase", "node", "pool", "", "market", "zone"}
    made.add_column(first, no_wrap=True)
    for heading in headings:
        made.add_column(heading, no_wrap=True, justify="left" if heading in left else "right")
    for row in rows:
        made.add_row(*row)
    return made


def _outcome(change: Change) -> str:
    return f"; {change.outcome}" if change.outcome else ""


def _age(age_s: float) -> str:
    return f"{age_s:.0f} s old" if age_s < NEVER_S else "not there yet"


def _model(model: ModelStatus) -> tuple[str | Text, ...]:
    if model.stale:
        return (model.model, *["unknown"] * 6)
    share = "-" if model.attainment is None else f"{model.attainment:.1%}"
    missed = model.attainment is not None and model.attainment < 0.99
    return (
        model.model,
        f"{model.rate_rps:.2f}/s",
        str(model.queued),
        str(model.in_flight),
        _against(model.ttft and model.ttft.p99_s, model.slo.ttft_s),
        _against(model.tpot and model.tpot.p99_s, model.slo.tpot_s),
        Text(share, style="red" if missed else "green"),
    )


def _against(value_s: float | None, bound_s: float | None) -> str:
    if value_s is None:
        return "-"
    return f"{1000 * value_s:.0f} ms" + (f" of {1000 * bound_s:.0f}" if bound_s is not None else "")


def _group(group: GroupStatus) -> tuple[str | Text, ...]:
    ready = Text(str(group.ready), style="green" if group.ready == group.wanted else "yellow")
    return (group.name, ready, str(group.wanted), str(group.min_replicas), str(group.max_replicas))


def _node(node: NodeStatus) -> tuple[str | Text, ...]:
    state = Text(node.held, style="yellow") if node.alive else Text("down", style="red")
    return (
        node.name,
        node.pool,
        state,
        node.market,
        node.zone or "-",
        f"{node.replicas}/{node.slots}",
        f"{node.power_w:.0f} W",
        f"{node.price_usd_per_hour:.2f}",
    )


def _replica(replica: ReplicaStatus) -> tuple[str | Text, ...]:
    """Of a replica that has told nothing yet, or does no more, only what is known of it."""
    known = (replica.replica_id, replica.role, Text(replica.phase, style=PHASE_STYLES.get(replica.phase, "")), replica.node)
    if replica.pid is None:
        return (*known, *["-"] * 5)
    return (
        *known,
        str(replica.running),
        str(replica.waiting),
        f"{replica.kv_blocks_used / max(replica.kv_blocks, 1):.0%}",
        f"{1000 * replica.step_s:.1f} ms",
        f"{replica.power_w:.0f} W",
    )


def _watch(home: FleetHome, now: FleetStatus) -> None:
    console = Console()
    try:
        if not console.is_terminal:  # In a pipe, one after another.
            while True:
                console.print(screen(now))
                console.file.flush()
                time.sleep(REFRESH_S)
                now = fetch(home)
        with Live(fitted(now, console), console=console, refresh_per_second=4) as live:
            while True:
                time.sleep(REFRESH_S)
                live.update(fitted(fetch(home), console))
    except KeyboardInterrupt:
        return
