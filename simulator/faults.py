"""What breaks: kills, hangs, slow machines, lost nodes, spot nodes that are taken away, telemetry that fails."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet
from cluster.node import Market
from simulator.cluster import SimulatedCluster
from simulator.timeline import Timeline, stream
from simulator.world import Fault, World


def check_faults(fleet: Fleet, world: World) -> None:
    """Raise InvalidConfig for a target that no node or group of the fleet can be, and for a trace that cannot be read."""
    nodes = {node.name for node in fleet.nodes}
    for index, fault in enumerate(world.faults):
        of_nodes = fault.kind in ("lose_node", "take_spot")
        if of_nodes and fault.target and fault.target not in nodes:
            raise InvalidConfig(f"faults[{index}].target {fault.target!r} is none of the nodes: {', '.join(sorted(nodes)[:8])}")
    zones = {node.zone for node in fleet.nodes if node.market is Market.SPOT}
    for zone, path in world.spot_traces.items():
        if zone not in zones:
            raise InvalidConfig(
                f"spot_traces.{zone}: no spot node is in that zone; zones with some: {', '.join(sorted(zones)) or 'none'}"
            )
        read_spot_trace(Path(path))


def read_spot_trace(path: Path) -> tuple[float, Sequence[int]]:
    """Seconds between two counts, and how many nodes could be had at each. Raises InvalidConfig naming the file."""
    try:
        data = json.loads(path.read_bytes())
        gap_s, counts = float(data["metadata"]["gap_seconds"]), [int(count) for count in data["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidConfig(
            f"{path}: is no spot trace, {{'metadata': {{'gap_seconds'}}, 'data': [count, ...]}}: {error!r}"
        ) from error
    if gap_s <= 0 or not counts or min(counts) < 0:
        raise InvalidConfig(f"{path}: gap_seconds {gap_s} and counts from {min(counts, default=0)}; expected > 0 and >= 0")
    return gap_s, counts


class Faults:
    """Has them happen."""

    def __init__(
        self, fleet: Fleet, world: World, timeline: Timeline, cluster: SimulatedCluster, seed: int, note: Callable[[str, str], None]
    ) -> None:
        """note: told of each, its kind and what happened."""
        self._fleet, self._world, self._timeline, self._cluster, self._note = fleet, world, timeline, cluster, note
        self._chance = stream(seed, "faults")
        for fault in world.faults:
            timeline.at(timeline.now_s + fault.at_s, partial(self._happen, fault))
        self._doomed: set[str] = set()
        """Nodes that are to go, and have had their notice."""
        self._short: set[str] = set()
        """Nodes that a spot trace does not have just now."""
        for node in fleet.nodes:
            if node.market is Market.SPOT and world.spot_mtbf_s is not None:
                self._plan_taking(node.name)
        for zone, path in world.spot_traces.items():
            self._follow(zone, *read_spot_trace(Path(path)))

    def _happen(self, fault: Fault) -> None:
        match fault.kind:
            case "kill" | "hang":
                self._end_replica(fault)
            case "slow":
                self._slow(fault)
            case "lose_node":
                self._lose(self._node(fault.target), fault.lasts_s)
            case "take_spot":
                self._take(self._node(fault.target, spot=True), fault.notice_s, fault.lasts_s)
            case "lose_telemetry":
                self._deafen(fault.lasts_s)

    def _end_replica(self, fault: Fault) -> None:
        names = [name for name, host in sorted(self._cluster.hosts.items()) if host.alive and fault.target in ("", name)]
        if not names:
            self._note(fault.kind, f"nothing: no replica {fault.target or 'at all'} lives")
            return
        host = self._cluster.hosts[self._chance.choice(names)]
        noticed_s = self._world.hop_s if fault.kind == "kill" else self._fleet.gateway.silence_s
        self._note(fault.kind, host.replica_id)
        self._cluster.kill(host, noticed_s)

    def _slow(self, fault: Fault) -> None:
        target = fault.target or self._node("")
        hosts = [host for host in self._cluster.hosts.values() if target in (host.replica_id, host.row.node)]
        if not hosts:
            self._note("slow", f"nothing: no replica {target}, and none on a node of that name")
            return
        for host in hosts:
            if host.alive:
                self._cluster.slow(host, fault.factor)
                if fault.lasts_s is not None:
                    self._timeline.after(fault.lasts_s, partial(self._cluster.slow, host, 1.0))
        self._note("slow", f"{target} x {fault.factor:g}")

    def _node(self, target: str, *, spot: bool = False) -> str:
        """The target, or one drawn of those that live."""
        if target:
            return target
        alive = [node for node in self._fleet.nodes if node.name not in self._cluster.dead_nodes]
        names = [node.name for node in alive if not spot or node.market is Market.SPOT]
        return self._chance.choice(sorted(names)) if names else ""

    def _lose(self, node: str, lasts_s: float | None) -> None:
        self._doomed.discard(node)
        if not node or node in self._cluster.dead_nodes:
            return
        self._note("node lost", node)
        self._cluster.lose_node(node)
        if lasts_s is not None:
            self._timeline.after(lasts_s, partial(self._back, node))

    def _back(self, node: str) -> None:
        self._cluster.regain_node(node)
        self._note("node back", node)

    def _take(self, node: str, notice_s: float, gone_s: float | None) -> None:
        if node:
            self._doomed.add(node)
            self._note("spot notice", f"{node} goes in {notice_s:g} s")
            self._timeline.after(notice_s, partial(self._lose_if_doomed, node, gone_s))

    def _lose_if_doomed(self, node: str, gone_s: float | None) -> None:
        if node in self._doomed:
            self._lose(node, gone_s)

    def _plan_taking(self, node: str) -> None:
        world = self._world
        assert world.spot_mtbf_s is not None, "asked for without a rate"
        self._timeline.after(self._chance.expovariate(1.0 / world.spot_mtbf_s), partial(self._take_and_plan, node))

    def _take_and_plan(self, node: str) -> None:
        world = self._world
        self._take(node, world.spot_notice_s, world.spot_gone_s)
        self._timeline.after(world.spot_notice_s + world.spot_gone_s, partial(self._plan_taking, node))

    def _follow(self, zone: str, gap_s: float, counts: Sequence[int]) -> None:
        names = [node.name for node in self._fleet.nodes if node.market is Market.SPOT and node.zone == zone]
        before = len(names)
        for step, count in enumerate(counts):
            if min(count, len(names)) != before:
                before = min(count, len(names))
                self._timeline.at(self._timeline.now_s + step * gap_s, partial(self._allow, names, before))

    def _allow(self, names: Sequence[str], count: int) -> None:
        """So many of a zone's spot nodes can be had: those after them go, after a notice; those before them come back."""
        for index, node in enumerate(names):
            if index >= count and node not in self._short:
                self._short.add(node)
                self._take(node, self._world.spot_notice_s, None)
            elif index < count and node in self._short:
                self._short.discard(node)
                self._doomed.discard(node)
                if node in self._cluster.dead_nodes:
                    self._back(node)

    def _deafen(self, lasts_s: float | None) -> None:
        self._cluster.deaf = True
        self._note("telemetry lost", "for ever" if lasts_s is None else f"for {lasts_s:g} s")
        if lasts_s is not None and math.isfinite(lasts_s):
            self._timeline.after(lasts_s, self._hear_again)

    def _hear_again(self) -> None:
        self._cluster.deaf = False
        self._note("telemetry back", "")
