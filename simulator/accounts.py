"""What a simulated fleet costs, draws and does: kept each second, and summed over all replicas that there were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.fleet import Fleet
from controller.observe.assemble import Started
from simulator.cluster import SimulatedCluster
from simulator.course import CourseKeeper
from simulator.engines import Engines, Work
from simulator.host import Host
from simulator.steps.records import KEPT, OUTPUT_TOKENS, TPOT, TTFT

HOUR_S = 3600.0


class Worked(NamedTuple):
    """Of all replicas, those that are gone among them."""

    busy_s: float
    present_s: float
    energy_j: float
    """Of their steps, and of idling between them."""
    output_tokens: int
    preemptions: int


class Accounts:
    """Told once a second."""

    def __init__(self, fleet: Fleet, cluster: SimulatedCluster, engines: Engines) -> None:
        self.usd = 0.0
        self._before = Worked(0.0, 0.0, 0.0, 0, 0)
        """The warm-up's."""
        self.course = CourseKeeper()
        self._cluster, self._engines = cluster, engines
        self._prices = {node.name: node.price_usd_per_hour for node in fleet.nodes}

    def note(self, seconds: float, totals: Mapping[str, float], in_flight: int, queued: int) -> None:
        """So much time has passed. totals: arrivals, completions and rejections since the start."""
        usd_per_hour = sum(self._prices[node] for node in self._hosting())
        self.usd += usd_per_hour * seconds / HOUR_S
        live = [host for host in self._cluster.hosts.values() if host.alive]
        blocks = sum(host.row.kv_blocks for host in live)
        levels = {
            "in_flight": float(in_flight),
            "queued": float(queued),
            "power_w": sum(host.load.power_w if host.load else host.idle_w for host in live),
            "kv_share": sum(host.load.kv_blocks_used for host in live if host.load) / blocks if blocks else 0.0,
            "usd_per_hour": usd_per_hour,
        }
        tallies = self._engines.state.tallies.sum(axis=0)
        counted = {"kept": float(tallies[KEPT]), "output_tokens": float(tallies[OUTPUT_TOKENS])}
        self.course.note({**totals, **counted}, levels, self._replicas(), self._sketches())

    def begin(self, now_s: float) -> None:
        """The warm-up is over, and does not count."""
        self.usd, self._before = 0.0, self._whole(now_s)

    def worked(self, now_s: float) -> Worked:
        """From the end of the warm-up until now."""
        return Worked(*(after - before for after, before in zip(self._whole(now_s), self._before, strict=True)))

    def _whole(self, now_s: float) -> Worked:
        hosts = [*self._cluster.gone, *self._cluster.hosts.values()]
        work = [(host, self._work(host, now_s)) for host in hosts]
        lives_s = [(now_s if host.gone_s is None else host.gone_s) - host.born_s for host in hosts]
        return Worked(
            busy_s=sum(one.busy_s for _, one in work),
            present_s=sum(lives_s),
            energy_j=sum(_energy_j(host, one, life_s) for (host, one), life_s in zip(work, lives_s, strict=True)),
            output_tokens=sum(one.output_tokens for _, one in work),
            preemptions=sum(one.preemptions for _, one in work),
        )

    def _hosting(self) -> set[str]:
        """Nodes are paid for while they host a replica, or start one."""
        hosts, starts = self._cluster.hosts.values(), self._cluster.started.values()
        return {host.row.node for host in hosts} | {start.node for start in starts}

    def _work(self, host: Host, now_s: float) -> Work:
        return self._engines.work(host.engine, now_s) if host.work is None else host.work

    def _replicas(self) -> Mapping[str, int]:
        """By role and phase."""
        return Counter([*map(_told, self._cluster.hosts.values()), *_starting(self._cluster.started.values())])

    def _sketches(self) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = self._engines.state.sketches[:, [TTFT, TPOT]].sum(axis=0)
        return counts


def _told(host: Host) -> str:
    return f"{host.row.role.value} {host.row.phase.value if host.alive else 'lost'}"


def _starting(starts: Iterable[Started]) -> list[str]:
    return [f"{start.group.rsplit('/', 2)[1]} starting" for start in starts]


def _energy_j(host: Host, work: Work, life_s: float) -> float:
    return work.energy_j + host.idle_w * max(0.0, life_s - work.busy_s)
