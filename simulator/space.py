"""The fleets among which the cheapest is looked for: any number of replicas of each group, on the cheapest nodes that hold them.

A fleet of the space is static: its controller is off, and a group has as many replicas as it begins with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet, NodeSpec
from cluster.placement import group_of, limits_of, slots_of
from controller.config.reading import decoded, named, read_config
from controller.spelling import did_you_mean

MAX_FLEETS = 2_000_000  # Counted out in memory, some 100 bytes each.
MAX_NODES = 10_000
Count = Annotated[int, msgspec.Meta(ge=0)]
Counts = NDArray[np.int64]
"""Replicas by group; or fleets by group."""


class SpaceFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be tried beyond what the cluster.yaml has."""

    replicas: dict[str, tuple[Count, Count]] = {}
    """Fewest and most by group, or by role where one group has it. Other groups: from 0 to their `max_replicas`."""
    nodes: dict[str, Annotated[int, msgspec.Meta(ge=1, le=MAX_NODES)]] = {}
    """Machines by pool that may be had, all like the pool's first one. Other pools: those of the file."""


def load_space(path: Path) -> SpaceFile:
    """Raises InvalidConfig with the value, its bound and its place."""
    data = read_config(path)
    with named(path):
        return decoded(data, SpaceFile)


class Space:
    """All fleets, by number, and what each costs."""

    def __init__(self, fleet: Fleet, asked: SpaceFile = SpaceFile()) -> None:
        """Raises InvalidConfig for a fleet whose price is unknown, and for a space that is empty or too large."""
        if len(fleet.models) > 1:
            raise InvalidConfig(f"models: {len(fleet.models)} are above 1: the search sizes one model at a time")
        self.fleet = msgspec.structs.replace(fleet, nodes=_nodes(fleet, asked.nodes))
        self.groups = tuple(group_of(fleet, spec) for spec in fleet.replicas)
        ranges = _ranges(fleet, self.groups, asked.replicas)
        total = math.prod(high - low + 1 for low, high in ranges)
        if total > MAX_FLEETS:
            raise InvalidConfig(f"replicas: {total} fleets are above {MAX_FLEETS}: narrow the groups' ranges in a space file")
        self._pools = {pool: _Pool([node for node in self.fleet.nodes if node.pool == pool]) for pool in _pools_used(fleet)}
        grid = np.meshgrid(*(np.arange(low, high + 1) for low, high in ranges), indexing="ij")
        counts = np.stack([axis.ravel() for axis in grid], axis=1)
        self.counts: Counts = counts[self._possible(counts)]
        if not len(self.counts):
            raise InvalidConfig("replicas: no fleet in the space has a replica that decodes and a node for each")
        prices = [pool.usd_per_hour[self._in_pool(self.counts, name)] for name, pool in self._pools.items()]
        self.usd_per_hour = np.round(np.sum(prices, axis=0), 6)  # So that equal sums in another order are equal.

    def named(self, counts: Counts) -> dict[str, int]:
        """Replicas by group, of one fleet."""
        return {group: int(count) for group, count in zip(self.groups, counts, strict=True)}

    def find(self, counts: Counts) -> int | None:
        """The number of the fleet of so many replicas; None where the space has no such fleet."""
        found = np.flatnonzero((self.counts == counts).all(axis=1))
        return int(found[0]) if len(found) else None

    def build(self, number: int) -> Fleet:
        """As a cluster.yaml: the groups that have a replica, and the nodes that host one."""
        counts, replace = self.counts[number], msgspec.structs.replace
        groups = tuple(
            replace(spec, count=count, min_replicas=count, max_replicas=count, schedules=())
            for spec, count in zip(self.fleet.replicas, counts.tolist(), strict=True)
            if count
        )
        nodes = tuple(
            node for name, pool in self._pools.items() for node in pool.cheapest(int(self._in_pool(counts[None, :], name)[0]))
        )
        return replace(self.fleet, replicas=groups, nodes=nodes)

    def _in_pool(self, counts: Counts, pool: str) -> Counts:
        return counts[:, [spec.pool == pool for spec in self.fleet.replicas]].sum(axis=1)

    def _possible(self, counts: Counts) -> NDArray[np.bool_]:
        decodes = counts[:, [spec.role.decodes for spec in self.fleet.replicas]].sum(axis=1) > 0
        fits = [self._in_pool(counts, name) <= pool.slots for name, pool in self._pools.items()]
        return np.logical_and.reduce([decodes, *fits])


class _Pool:
    """Nodes of one pool, and for each number of replicas the cheapest of them that hold it."""

    def __init__(self, nodes: list[NodeSpec]) -> None:
        self._nodes = nodes
        self.slots = sum(node.slots or 0 for node in nodes)
        self.usd_per_hour = np.full(self.slots + 1, np.inf)
        self.usd_per_hour[0] = 0.0
        self._taken = np.zeros((len(nodes), self.slots + 1), bool)
        needed = np.arange(self.slots + 1)
        for index, node in enumerate(nodes):
            with_it = self.usd_per_hour[np.maximum(needed - (node.slots or 0), 0)] + node.price_usd_per_hour
            self._taken[index] = (with_it < self.usd_per_hour) & (needed > 0)
            self.usd_per_hour = np.where(self._taken[index], with_it, self.usd_per_hour)

    def cheapest(self, replicas: int) -> list[NodeSpec]:
        """The least price that covers so many slots (the covering knapsack, by dynamic programming over slots)."""
        found = []
        for index in range(len(self._nodes) - 1, -1, -1):
            if self._taken[index, replicas]:
                found.append(self._nodes[index])
                replicas = max(replicas - (self._nodes[index].slots or 0), 0)
        return found[::-1]


def _pools_used(fleet: Fleet) -> list[str]:
    return list(dict.fromkeys(spec.pool for spec in fleet.replicas))


def _nodes(fleet: Fleet, asked: Mapping[str, int]) -> tuple[NodeSpec, ...]:
    """Of the pools that groups are in, their slots spelled out: these no longer follow from what groups may have."""
    pools = _pools_used(fleet)
    for pool in asked:
        if pool not in pools:
            raise InvalidConfig(f"nodes.{pool}: no group is on a pool of that name{did_you_mean(pool, pools)}")
    nodes = [node for node in fleet.nodes if node.pool in pools and node.pool not in asked]
    for pool, count in asked.items():
        first = next(node for node in fleet.nodes if node.pool == pool)
        nodes += [first if index == 0 else msgspec.structs.replace(first, name=f"{pool}-more-{index}") for index in range(count)]
    for node in nodes:
        if node.price_usd_per_hour <= 0.0:
            raise InvalidConfig(
                f"node {node.name} has price_usd_per_hour {node.price_usd_per_hour}: what is cheapest needs prices above 0"
            )
    slots = {node.name: slots_of(fleet, node) for node in fleet.nodes}
    return tuple(msgspec.structs.replace(node, slots=slots.get(node.name) or slots_of(fleet, node)) for node in nodes)


def _ranges(fleet: Fleet, groups: tuple[str, ...], asked: Mapping[str, tuple[int, int]]) -> list[tuple[int, int]]:
    of_name = {}
    for name, bounds in asked.items():
        index = _group(fleet, groups, name)
        if bounds[0] > bounds[1]:
            raise InvalidConfig(f"replicas.{name}: the fewest, {bounds[0]}, are above the most, {bounds[1]}")
        of_name[groups[index]] = bounds
    return [of_name.get(group, (0, limits_of(spec)[1])) for group, spec in zip(groups, fleet.replicas, strict=True)]


def _group(fleet: Fleet, groups: tuple[str, ...], name: str) -> int:
    found = [index for index, spec in enumerate(fleet.replicas) if name in (groups[index], spec.role.value)]
    if len(found) != 1:
        what = "is no group" if not found else f"is the role of {len(found)} groups"
        raise InvalidConfig(f"replicas.{name} {what}; groups are {', '.join(groups)}")
    return found[0]
