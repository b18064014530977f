"""A day's load on hundreds of live replicas: `python -m benchmarks.soak [--minutes 15] [--replicas 300] [--json]`.

`mobula up` starts the fleet on this machine, emulated replicas with fifty to a worker process, each a tenth as fast as an L4 with
an 8B model, so that all of them are needed for what two cores can carry. Requests arrive by chance (Poisson) at a rate that
swings around what the replicas of the start carry, `DAYS` days in the run; the controller decides with its defaults between two
thirds and four thirds of that count.

Every `SAMPLE_S` CPU and memory of controller, gateway and workers are read, and the controller's own metrics. Memory counts from
`WARM_UP_S` on (in a short run, from its half on), when every window is full: its growth is the slope of a least-squares line.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import re
import signal
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.live_fleet import LiveFleet, live_fleet
from cluster.errors import Unreachable
from cluster.fleet import Fleet, NodeSpec, Pace, ReplicaGroup
from cluster.replica import Role
from cluster.slo import Slo
from controller.observe.assemble import SPAN_S
from workloads import client
from workloads.client import Load
from workloads.generators import Generator, Lengths
from workloads.report import summarise

NODES, PER_WORKER = 3, 50
PACE = Pace(shape="llama-3.1-8b", accelerator="l4", speedup=0.1)
SLO = Slo(ttft_s=5.0, tpot_s=1.0)
PROMPT = Lengths(kind="lognormal", first=128, second=0.4, low=16, high=512)
OUTPUT = Lengths(kind="lognormal", first=30, second=0.3, low=8, high=80)
CARRIED_RPS = 1 / 15  # By one replica of this pace with these requests, as the default sizing has it.
DAYS, SWING = 2, 0.3
STEP_S = 5.0
SAMPLE_S = 5.0
WARM_UP_S = SPAN_S  # The longest memory that a controller has of anything but its journal.
KINDS = ("controller", "gateway", "worker")


def fleet(replicas: int) -> Fleet:
    most = math.ceil(replicas * 4 / 3)
    group = ReplicaGroup(
        role=Role.MIXED,
        count=replicas,
        min_replicas=replicas * 2 // 3,
        max_replicas=most,
        startup_s=1.0,
        engine="emulated",
        pace=PACE,
        per_worker=PER_WORKER,
        kv_blocks=128,  # Prefix caches are full by the end of the warm-up.
        max_running=4,
    )
    nodes = tuple(NodeSpec(name=f"node-{number}", slots=math.ceil(most / NODES)) for number in range(NODES))
    return Fleet(name="soak", models=(), nodes=nodes, replicas=(group,), slo={"default": SLO})


def load(replicas: int, seconds: float) -> Generator:
    mean_rps, day_s = replicas * CARRIED_RPS, seconds / DAYS
    rates = [mean_rps * (1.0 - SWING * math.cos(math.tau * place / day_s)) for place in np.arange(0.0, seconds, STEP_S)]
    return Generator(steps=tuple((rate, STEP_S) for rate in rates), prompt=PROMPT, output=OUTPUT)


class Usage(NamedTuple):
    """Of the processes of one kind."""

    processes: int
    cpu_s: float
    """Since their starts, summed."""
    mib: float
    """Resident, a process."""


class Reading(NamedTuple):
    """At one time."""

    at_s: float
    usage: dict[str, Usage]
    ready: int
    passes: float
    pass_s: float
    """Seconds that all passes took."""
    actions: float
    journal_bytes: float


class Watch:
    """Reads a fleet. Its controller must live as long."""

    def __init__(self, live: LiveFleet) -> None:
        self._live = live
        self._began_s = time.monotonic()
        status = live.status()
        self._metrics_url = f"{status.http_url}/metrics"
        self._controller = psutil.Process(status.controller_pid)
        self._gateways = [one for one in live.processes() if "gateway" in " ".join(one.cmdline())]
        self.readings: list[Reading] = []
        self.unanswered = 0

    def read(self) -> Reading | None:
        """None where the controller does not answer in time, which is counted. Raises psutil.NoSuchProcess where it has died."""
        try:
            status, totals = self._live.status(), self._totals()
        except (Unreachable, TimeoutError):
            self.unanswered += 1
            return None
        pids = {row.pid for row in status.replicas if row.pid is not None}
        workers = [psutil.Process(pid) for pid in sorted(pids) if psutil.pid_exists(pid)]
        reading = Reading(
            at_s=time.monotonic() - self._began_s,
            usage=dict(zip(KINDS, map(_usage, ([self._controller], self._gateways, workers)), strict=True)),
            ready=sum(group.ready for group in status.groups),
            passes=totals["mobula_controller_pass_seconds_count"],
            pass_s=totals["mobula_controller_pass_seconds_sum"],
            actions=totals["mobula_controller_actions_total"],
            journal_bytes=totals["mobula_controller_journal_bytes"],
        )
        self.readings.append(reading)
        return reading

    def _totals(self) -> Counter[str]:
        """The controller's metrics, summed over labels."""
        with urllib.request.urlopen(self._metrics_url, timeout=SAMPLE_S) as answer:
            text = answer.read().decode()
        found: Counter[str] = Counter()
        for name, value in re.findall(r"^(\w+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
            found[name] += float(value)
        return found


def _usage(processes: Sequence[psutil.Process]) -> Usage:
    times = [process.cpu_times() for process in processes]
    mib = fmean(process.memory_info().rss for process in processes) / 2**20
    return Usage(len(processes), sum(one.user + one.system for one in times), mib)


async def soak(live: LiveFleet, generator: Generator, watch: Watch) -> Load:
    """The whole load, read all the while."""
    sent = Load()
    replay = asyncio.create_task(client.run(generator.rows(seed=1), live.target, sent))
    while not replay.done():
        await asyncio.wait([replay], timeout=SAMPLE_S)
        reading = await asyncio.to_thread(watch.read)
        if reading is None:
            continue
        failed = sum(not sample.timing.completed for sample in sent.samples)
        memory = ", ".join(f"{kind} {usage.mib:.1f}" for kind, usage in reading.usage.items())
        print(
            f"{reading.at_s:4.0f} s of {generator.span_s:.0f}: {reading.ready} replicas, {len(sent.samples)} requests done, "
            f"{failed} failed; MiB: {memory}",
            file=sys.stderr,
            flush=True,
        )
    for sample in (one for one in sent.samples if not one.timing.completed):
        print(f"{sample.end_s:.0f} s: {sample.timing.error} {sample.detail}", file=sys.stderr, flush=True)
    return replay.result()


def figures(sent: Load, readings: Sequence[Reading]) -> dict[str, float]:
    first, last = readings[0], readings[-1]
    minutes = (last.at_s - first.at_s) / 60.0
    report = summarise(sent, SLO, workload="", target="")
    passes = last.passes - first.passes
    pairs = list(itertools.pairwise(readings))
    found = {
        "minutes": minutes,
        "replicas_mean": fmean(one.ready for one in readings),
        "replicas_least": min(one.ready for one in readings),
        "replicas_most": max(one.ready for one in readings),
        "decisions_per_minute": passes / minutes,
        "actions_per_minute": (last.actions - first.actions) / minutes,
        "pass_ms_mean": 1e3 * (last.pass_s - first.pass_s) / passes,
        "pass_ms_worst_5s": max(1e3 * (b.pass_s - a.pass_s) / (b.passes - a.passes) for a, b in pairs if b.passes > a.passes),
        "journal_mb_per_day": (last.journal_bytes - first.journal_bytes) / 1e6 / minutes * 1440,
        "requests": report.requests,
        "failed": report.requests - report.completed,
        "in_slo_share": report.slo_met / max(1, report.requests),
    }
    for kind in ("controller", "gateway"):
        shares = [(b.usage[kind].cpu_s - a.usage[kind].cpu_s) / (b.at_s - a.at_s) for a, b in pairs]
        total = last.usage[kind].cpu_s - first.usage[kind].cpu_s
        found |= {f"{kind}_cpu_mean": total / 60.0 / minutes, f"{kind}_cpu_worst_5s": max(shares)}
    for kind in KINDS:
        found |= {f"{kind}_{name}": value for name, value in _memory(kind, readings).items()}
    return {name: round(value, 4) for name, value in found.items()}


def _memory(kind: str, readings: Sequence[Reading]) -> dict[str, float]:
    """MiB at the end of the warm-up and at the end, and what the line through all between gains in an hour."""
    warm_s = min(WARM_UP_S, readings[-1].at_s / 2)
    warm = [one for one in readings if one.at_s >= warm_s]
    hours, mib = np.array([(one.at_s / 3600.0, one.usage[kind].mib) for one in warm]).T
    slope, start = np.polyfit(hours - hours[0], mib, 1)
    return {"mib_start": start, "mib_end": start + slope * (hours[-1] - hours[0]), "mib_per_hour": slope}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--replicas", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Takes the fleet down on the way out.
    with live_fleet(fleet(asked.replicas)) as live:
        watch = Watch(live)
        watch.read()
        sent = asyncio.run(soak(live, load(asked.replicas, 60.0 * asked.minutes), watch))
    found = figures(sent, watch.readings) | {"readings_missed": watch.unanswered}
    _print(found)
    if asked.json:
        print(json.dumps(found))


def _print(found: dict[str, float]) -> None:
    table = Table("", "measured", title=f"{found['replicas_mean']:.0f} live emulated replicas")
    for name, value in found.items():
        table.add_row(name, f"{value:,.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
