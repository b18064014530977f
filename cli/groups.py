"""Groups of replicas as people name them on a command line."""

from __future__ import annotations

import difflib

from cluster.errors import InvalidRequest
from cluster.fleet import Fleet, ReplicaGroup
from cluster.placement import group_of

MOST_LIKE = 3


def named_group(fleet: Fleet, name: str) -> tuple[str, ReplicaGroup]:
    """A group by its name, or by its role where no other has it. Raises InvalidRequest naming those near."""
    groups = {group_of(fleet, spec): spec for spec in fleet.replicas}
    if name in groups:
        return name, groups[name]
    of_role = [group for group, spec in groups.items() if spec.role.value == name]
    if len(of_role) == 1:
        return of_role[0], groups[of_role[0]]
    if of_role:
        raise InvalidRequest(f"{len(of_role)} groups of fleet {fleet.name} are of role {name}: {', '.join(of_role)}; name one")
    raise InvalidRequest(f"{name} is no group or role of fleet {fleet.name}; {near(name, list(groups), 'groups')}")


def near(name: str, known: list[str], what: str) -> str:
    """For an error: the known names most like one, or all."""
    near = difflib.get_close_matches(name, known, MOST_LIKE)
    return f"near it are {', '.join(near)}" if near else f"its {what} are {', '.join(known)}"
