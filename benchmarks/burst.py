"""A step in load against real fleets on this machine: `python -m benchmarks.burst [--json]`.

A steady load of `STEADY_RPS` becomes `FACTOR` times as much at once and stays so. The same trace is sent by the same client to
- mobula: `mobula up`, the controller with its defaults;
- hpa: the same, but by a queue-length rule with the defaults of Kubernetes' horizontal autoscaler (`benchmarks.hpa`);
- serve: Ray Serve with `num_replicas="auto"` (2 ongoing requests a replica, decisions after 30 s, 5 at most in a replica), whose
  replicas hold the same engines.
All begin with the same count, have the same least and most, engines of one pace, one replica to a process, and wait for as long as
a process here takes to start. The queue-length rule has the target that Serve has.

To SLO: seconds from the step to the first `BIN_S` window of arrivals of which, and from which on to the end, at least `MET_SHARE`
met both TTFT and TPOT; null where there is none. Replica-seconds are those held from the step to the trace's end, starting and
draining ones among them. Worst TTFT P99: of any window after the step.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from statistics import fmean
from typing import NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.live_fleet import LiveFleet, live_fleet
from benchmarks.serve_arm import serve_arm
from cluster.fleet import ControlSpec, Fleet, NodeSpec, Pace, PipelineSpec, PolicySpec, ReplicaGroup
from cluster.replica import Role
from cluster.slo import Slo, meets
from workloads import client
from workloads.client import Load, Sample, Target
from workloads.generators import Generator, Lengths

STEADY_RPS, FACTOR = 2.0, 4.0
STEADY_S, BURST_S = 30.0, 110.0
BIN_S, MET_SHARE = 5.0, 0.99
COUNT_S = 0.5
SLO = Slo(ttft_s=2.0, tpot_s=0.15)
PACE = Pace(shape="llama-3.1-8b", accelerator="l4")
GROUP = ReplicaGroup(
    role=Role.MIXED,
    count=3,
    min_replicas=2,
    max_replicas=12,
    startup_s=5.0,
    engine="emulated",
    pace=PACE,
    kv_blocks=1024,
    max_running=5,  # As many as Serve lets into a replica.
)
FLEET = Fleet(name="burst", models=(), nodes=(NodeSpec(name="node"),), replicas=(GROUP,), slo={"default": SLO})
HPA = ControlSpec(pipeline=PipelineSpec(policies=(PolicySpec(use="benchmarks.hpa:QueueLength"),)))
TRACE = Generator(
    steps=((STEADY_RPS, STEADY_S), (FACTOR * STEADY_RPS, BURST_S)),
    prompt=Lengths(kind="lognormal", first=1000, second=0.3, low=64, high=3000),
    output=Lengths(kind="lognormal", first=24, second=0.3, low=8, high=64),
)


Figures = dict[str, float | None]


class Count(NamedTuple):
    """Replicas at a time after the trace's start."""

    at_s: float
    held: int
    ready: int


class Arm(NamedTuple):
    """Something that serves and scales."""

    target: Target
    count: Callable[[], tuple[int, int]]
    """Replicas held, and ready ones. Blocks."""


class Run(NamedTuple):
    """What came of one arm."""

    samples: Sequence[Sample]
    counts: Sequence[Count]


@contextmanager
def mobula(fleet: Fleet) -> Iterator[Arm]:
    with live_fleet(fleet) as live:
        yield Arm(live.target, lambda: _counted(live))


@contextmanager
def serve(fleet: Fleet) -> Iterator[Arm]:
    with serve_arm(fleet) as arm:
        yield Arm(arm.target, arm.count)


ARMS: dict[str, Callable[[], AbstractContextManager[Arm]]] = {
    "mobula": lambda: mobula(FLEET),
    "hpa": lambda: mobula(msgspec.structs.replace(FLEET, control=HPA)),
    "serve": lambda: serve(FLEET),
}


def _counted(live: LiveFleet) -> tuple[int, int]:
    phases = [replica.phase for replica in live.status().replicas]
    return sum(phase not in ("lost", "stopped") for phase in phases), phases.count("ready")


async def run(name: str, arm: Arm) -> Run:
    """The whole trace, the replicas counted all the while."""
    load, counts, began_s = Load(), [], time.monotonic()
    replay = asyncio.create_task(client.run(TRACE.rows(seed=1), arm.target, load))
    while not replay.done():
        at_s = time.monotonic() - began_s
        counts.append(Count(at_s, *await asyncio.to_thread(arm.count)))
        if len(counts) % 10 == 1:
            said = f"{counts[-1].ready} of {counts[-1].held} replicas ready, {load.in_flight} in flight, {len(load.samples)} done"
            print(f"{name}: {at_s:4.0f} s of {TRACE.span_s:.0f}: {said}", file=sys.stderr, flush=True)
        await asyncio.wait([replay], timeout=COUNT_S)
    return Run(replay.result().samples, counts)


def figures(run: Run) -> Figures:
    late = [sample for sample in run.samples if sample.row.arrival_s >= STEADY_S]
    met = [[meets(sample.timing, SLO) for sample in part] for part in binned(late)]
    early = [meets(sample.timing, SLO) for sample in run.samples if sample.row.arrival_s < STEADY_S]
    ttfts = [[sample.timing.ttft_s for sample in part if sample.timing.ttft_s is not None] for part in binned(late)]
    after = [count for count in run.counts if STEADY_S <= count.at_s < TRACE.span_s]
    return {
        "to_slo_s": to_slo_s(met),
        "replica_s": sum(one.held * (two.at_s - one.at_s) for one, two in itertools.pairwise(after)),
        "worst_ttft_p99_s": max(float(np.percentile(part, 99)) for part in ttfts if part),
        "missed": sum(not one for part in met for one in part),
        "failed": sum(not sample.timing.completed for sample in run.samples),
        "requests": len(run.samples),
        "in_slo_before": fmean(early),
        "replicas_before": next(count.held for count in reversed(run.counts) if count.at_s < STEADY_S),
        "replicas_most": max(count.held for count in run.counts),
        "send_lag_p99_s": float(np.percentile([sample.send_lag_s for sample in run.samples], 99)),
    }


def binned(samples: Sequence[Sample]) -> list[list[Sample]]:
    """By arrival after the step."""
    bins: list[list[Sample]] = [[] for _ in range(math.ceil(BURST_S / BIN_S))]
    for sample in samples:
        bins[int((sample.row.arrival_s - STEADY_S) // BIN_S)].append(sample)
    return bins


def to_slo_s(met: Sequence[Sequence[bool]]) -> float | None:
    """met: whether each arrival of each window after the step was inside the SLO."""
    for number, part in enumerate(met):
        rest = list(itertools.chain.from_iterable(met[number:]))
        if part and fmean(part) >= MET_SHARE and fmean(rest) >= MET_SHARE:
            return number * BIN_S
    return None


def measure(names: Sequence[str] = tuple(ARMS)) -> dict[str, Figures]:
    """By arm, one after the other: about two and a half minutes each."""
    found = {}
    for name in names:
        print(f"{name}: starting", file=sys.stderr, flush=True)
        with ARMS[name]() as arm:
            found[name] = figures(asyncio.run(run(name, arm)))
    return found


def as_json(found: dict[str, Figures]) -> str:
    """One object, whose keys begin with the arm."""
    setting = {"steady_rps": STEADY_RPS, "factor": FACTOR, "speedup": PACE.speedup}
    flat = {f"{name}_{key}": value for name, one in found.items() for key, value in one.items()}
    return json.dumps(setting | {key: value if value is None else round(value, 3) for key, value in flat.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="only these")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Takes the fleet down on the way out.
    found = measure(asked.arms)
    _print(found)
    if asked.json:
        print(as_json(found))


def _print(found: dict[str, Figures]) -> None:
    table = Table("", *found, title=f"{STEADY_RPS:.0f} requests/s become {FACTOR * STEADY_RPS:.0f}")
    for key in next(iter(found.values())):
        values = [one[key] for one in found.values()]
        table.add_row(key, *("never" if value is None else f"{value:,.2f}" for value in values))
    Console().print(table)


if __name__ == "__main__":
    main()
