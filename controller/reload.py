"""What differs between two fleets, and whether a running one can become the other. Pure, but that policies are imported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet, ModelSpec, NodeSpec, ReplicaGroup
from cluster.placement import group_of
from controller.config import effective

LIVE = re.compile(
    r"control(?!\.http_port\b)\b.*"
    r"|replicas\[\d+\]\.(count|min_replicas|max_replicas|schedules.*|startup_s|start_timeout_s)"
    r"|nodes\[\d+\]\.(slots|price_usd_per_hour|zone|power_domain|market)"
)
"""Paths of what the controller alone goes by, and reads anew in each pass. All else is in processes that are started with it.

A count is of the next start, and must be within the limits; else these could not pass it while the fleet runs.
"""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One setting, both ways. A value is plain, as a file has it; None also where a node, group or model is in one fleet only."""

    path: str
    """As in `replicas[0].max_replicas`, with its number in the new fleet; in the old one for what is gone."""
    of: str = ""
    """The node, group or model that has it."""
    old: object
    new: object

    @property
    def live(self) -> bool:
        """Whether it may change while the fleet runs."""
        return LIVE.fullmatch(self.path) is not None

    def __str__(self) -> str:
        of = f" of {self.of}" if self.of else ""
        return f"{self.path}{of}: {shown(self.old)} to {shown(self.new)}"


def differences(old: Fleet, new: Fleet) -> tuple[Difference, ...]:
    """Of the effective fleets, in the order of the file: what is written otherwise and comes to the same is none.

    Nodes, groups and models are the same where their names are, wherever they stand; policies where their places are.
    Raises InvalidConfig for policies that cannot be made.
    """
    old, new = effective(old), effective(new)
    found: list[Difference] = []
    for field in new.__struct_fields__:
        before, after = getattr(old, field), getattr(new, field)
        if field in ("models", "nodes", "replicas"):
            found += _named(field, _by_name(old, before), _by_name(new, after))
        else:
            found += _within(field, msgspec.to_builtins(before), msgspec.to_builtins(after), "")
    return tuple(found)


def check_reload(old: Fleet, new: Fleet) -> None:
    """Raise InvalidConfig for the first setting that cannot change while the fleet runs. Both fleets are checked already."""
    for difference in differences(old, new):
        if not difference.live:
            raise InvalidConfig(f"{difference} cannot be while the fleet runs; `mobula down` and `mobula up` change it")


Item = ModelSpec | NodeSpec | ReplicaGroup


def _by_name(fleet: Fleet, items: Sequence[Item]) -> dict[str, tuple[int, object]]:
    """Each item's number and its plain form."""
    names = [group_of(fleet, item) if isinstance(item, ReplicaGroup) else item.name for item in items]
    return {name: (index, msgspec.to_builtins(item)) for index, (name, item) in enumerate(zip(names, items, strict=True))}


def _named(field: str, old: Mapping[str, tuple[int, object]], new: Mapping[str, tuple[int, object]]) -> Iterator[Difference]:
    for name, (index, after) in new.items():
        if name in old:
            yield from _within(f"{field}[{index}]", old[name][1], after, name)
        else:
            yield Difference(path=f"{field}[{index}]", of=name, old=None, new=after)
    for name, (index, before) in old.items():
        if name not in new:
            yield Difference(path=f"{field}[{index}]", of=name, old=before, new=None)


def _within(path: str, old: object, new: object, of: str) -> Iterator[Difference]:
    """The deepest settings that differ; a list of another length, and what appears or goes in a mapping, as a whole."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from _within(f"{path}.{key}", old.get(key), new.get(key), of)
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _within(f"{path}[{index}]", before, after, of)
    elif old != new:
        yield Difference(path=path, of=of, old=old, new=new)


def shown(value: object) -> str:
    """A plain value in few characters."""
    match value:
        case None:
            return "none"
        case dict():
            return f"{len(value)} settings"
        case list() | tuple():
            return f"{len(value)} entries"
        case _:
            return str(value)
