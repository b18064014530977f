"""An operator's hands on a running fleet: `mobula pause`, `resume`, `cordon`, `uncordon`, `drain`, `pin` and `unpin`."""

from __future__ import annotations

import getpass
import time
from collections.abc import Iterable
from typing import Annotated, Literal

import typer

from cli.ask import ask
from cli.fleet_home import FleetHome, only_fleet
from cli.groups import named_group, near
from cli.times import DAY_S, clock, duration, spell
from cluster.errors import InvalidConfig, InvalidRequest
from cluster.fleet import Fleet
from cluster.placement import limits_of
from cluster.snapshot import Hold

MOST_S = 7 * DAY_S  # What is to hold for longer belongs into cluster.yaml.
MOST_REPLICAS = 10_000  # As of a whole config.
MOST_AUTHOR_CHARS = 64

FleetName = Annotated[str | None, typer.Option("--fleet", metavar="NAME", help="Which fleet; may be left out with only one up.")]
For = Annotated[str, typer.Option("--for", metavar="TIME", help="How long: 30m, 2h, 1d; at most 7d.")]
Author = Annotated[str | None, typer.Option("--author", metavar="NAME", help="Who says so; the OS user by default.")]
NodeName = Annotated[str, typer.Argument(metavar="NODE", help="As cluster.yaml names it.")]
GroupName = Annotated[str, typer.Argument(metavar="GROUP", help="MODEL/ROLE/POOL, or a role where only one group has it.")]


def pause(lasting: For = "1h", author: Author = None, fleet: FleetName = None) -> None:
    """Stop scaling: targets stay as they are. What is lost is still replaced.

    Examples:

    mobula pause

    mobula pause --for 30m --author ann
    """
    _hold(_home(fleet), "pause", "scaling is paused, lost replicas are still replaced", lasting, author)


def resume(fleet: FleetName = None) -> None:
    """End a pause before its time.

    Example: mobula resume
    """
    _unhold(_home(fleet), ("pause",), "", "scaling goes on", "scaling was not paused")


def cordon(node: NodeName, lasting: For = "1h", author: Author = None, fleet: FleetName = None) -> None:
    """Start nothing new on a node. What runs there stays.

    Example: mobula cordon node-c --for 2h
    """
    home = _home(fleet)
    _check_node(_fleet(home), node)
    _hold(home, "cordon", f"{node} takes no new replica", lasting, author, target=node)


def uncordon(node: NodeName, fleet: FleetName = None) -> None:
    """End a node's cordon or drain before its time.

    Example: mobula uncordon node-c
    """
    home = _home(fleet)
    _check_node(_fleet(home), node)
    _unhold(home, ("cordon", "drain"), node, f"{node} takes replicas again", f"{node} was neither cordoned nor drained")


def drain(node: NodeName, lasting: For = "1h", author: Author = None, fleet: FleetName = None) -> None:
    """Move everything off a node: its replicas drain, others are started elsewhere, and it takes no new one.

    Example: mobula drain node-c --for 4h
    """
    home = _home(fleet)
    _check_node(_fleet(home), node)
    _hold(home, "drain", f"{node} drains and takes no new replica", lasting, author, target=node)


def pin(
    group: GroupName,
    count: Annotated[int, typer.Argument(metavar="N", help="Replicas to keep.", min=0)],
    lasting: For = "1h",
    author: Author = None,
    fleet: FleetName = None,
) -> None:
    """Keep a group at a number of replicas, whatever the policies say. It goes before the group's own limits.

    Examples:

    mobula pin decode 6

    mobula pin llama/prefill/h100 2 --for 1d
    """
    if count > MOST_REPLICAS:
        raise InvalidConfig(f"{count} replicas are above {MOST_REPLICAS}, the most that a fleet may have")
    home = _home(fleet)
    name, spec = named_group(_fleet(home), group)
    low, high = limits_of(spec)
    beyond = "" if low <= count <= high else f", outside its limits of {low} to {high}"
    _hold(home, "pin", f"{name} is pinned at {count}{beyond}", lasting, author, target=name, replicas=count)


def unpin(group: GroupName, fleet: FleetName = None) -> None:
    """Give a group back to the policies before its pin's time.

    Example: mobula unpin decode
    """
    home = _home(fleet)
    name, _ = named_group(_fleet(home), group)
    _unhold(home, ("pin",), name, f"{name} is scaled by the policies again", f"{name} was not pinned")


def _home(fleet: str | None) -> FleetHome:
    return FleetHome(only_fleet(fleet))


def _fleet(home: FleetHome) -> Fleet:
    return ask(home, "fleet", Fleet)


def _hold(
    home: FleetHome,
    kind: Literal["pause", "cordon", "drain", "pin"],
    told: str,
    lasting: str,
    author: str | None,
    *,
    target: str = "",
    replicas: int | None = None,
) -> None:
    """Have it in force, then say so."""
    now_s, span_s = time.time(), _span_s(lasting)
    hold = Hold(kind=kind, target=target, replicas=replicas, author=_author(author), expires_s=now_s + span_s)
    ask(home, "hold", type(None), hold=hold)
    typer.echo(f"{told}, until {clock(hold.expires_s, now_s)} ({spell(span_s)}), by {hold.author}")


def _unhold(home: FleetHome, kinds: Iterable[str], target: str, ended: str, nothing: str) -> None:
    typer.echo(ended if ask(home, "unhold", bool, kinds=list(kinds), target=target) else nothing)


def _span_s(lasting: str) -> float:
    span_s = duration(lasting, "--for")
    if not 0 < span_s <= MOST_S:
        raise InvalidConfig(f"--for {lasting} is not above 0 and at most {spell(MOST_S)}")
    return span_s


def _author(author: str | None) -> str:
    name = _user() if author is None else author
    if not name.strip() or not name.isprintable() or len(name) > MOST_AUTHOR_CHARS:
        raise InvalidConfig(f"--author {name!r} is empty, not printable or above {MOST_AUTHOR_CHARS} characters")
    return name


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:
        raise InvalidConfig("this OS user has no name; say who you are with --author") from error


def _check_node(fleet: Fleet, name: str) -> None:
    known = [node.name for node in fleet.nodes]
    if name not in known:
        raise InvalidRequest(f"{name} is no node of fleet {fleet.name}; {near(name, known, 'nodes')}")
