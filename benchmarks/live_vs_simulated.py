"""Live against simulated: `python -m benchmarks.live_vs_simulated [--json] [--seconds 60] [--arms unpaced paced]`.

Two small fleets of the torch engine on this machine, one after the other: `unpaced` is one mixed replica as fast as a core is,
`paced` a prefill and a decode replica that last as long as named machines. Of each,

1. step times are measured on the engine alone (`mobula calibrate`; a paced one's are known);
2. `mobula up` starts it; a burst, and then a calibration trace in stages of rising load, are sent through its gateway;
3. factors on the step times, and the delays of the simulator's `World`, are fitted to those (`benchmarks.fleet_calibration`);
4. traces of another seed and other lengths, at three shares of what the simulated fleet carries, are sent live and simulated.

Reported are P50 and P90 of TTFT and TPOT as the client saw them and as simulated. The client shares the machine's cores with the
fleet, when it is calibrated as when it is judged; what it takes of them, and what others take, is stated for each run. Ray gives
its workers the niceness 15, so that the client, and whatever else runs, would go before the engine: here all are equal.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil
from rich.console import Console

from benchmarks.agreement import Agreement, agreement, mean_error, table
from benchmarks.fleet_calibration import Fitted, Seen, fitted
from benchmarks.live_fleet import MODEL, LiveFleet, live_fleet
from benchmarks.simulated_replay import replay
from cli.calibrate import fitted_table, measured
from cluster.fleet import Fleet, ModelSpec, NodeSpec, Pace, ReplicaGroup
from cluster.kv import KvLayout
from cluster.record import TraceRow
from cluster.replica import Role
from cluster.slo import RequestTiming, Slo
from cluster.step_table import StepTable, step_table_of
from simulator.world import World
from workers.build_engine import performance_of
from workers.engines.torch_engine.tiny_model import ensure
from workloads import client
from workloads.generators import Generator, Lengths

PRESET = "tiny-dense"
LOADS = (0.3, 0.6, 0.85)
"""Shares of what the fleet carries, as simulated."""
STAGES = (0.3, 0.5, 0.7, 0.85)
"""Of the calibration trace: shares of what the fleet carried live."""
CALIBRATION = (
    Lengths(kind="lognormal", first=120, second=0.8, low=16, high=800),
    Lengths(kind="lognormal", first=40, second=0.5, low=4, high=120),
)
UNSEEN = (
    Lengths(kind="lognormal", first=200, second=0.5, low=32, high=700),
    Lengths(kind="lognormal", first=28, second=0.6, low=4, high=140),
)
"""Prompts and outputs."""
CALIBRATION_SEED, BURST_SEED, UNSEEN_SEED, WARM_SEED = 101, 151, 202, 303
WARM = (4.0, 5.0)  # Requests a second, and seconds.
SATURATING = 200  # Requests at once, fewer than a gateway lets wait.
HOST_BYTES_S = 1.86e9  # Shared memory between two workers here (`benchmarks.kv_transfer`).


class Arm(NamedTuple):
    fleet: Fleet
    fitted: tuple[str, ...]
    """Of `Fitted`: what is not known before."""


def arms() -> dict[str, Arm]:
    slo = {"default": Slo(ttft_s=10.0, tpot_s=1.0)}
    unpaced = ReplicaGroup(role=Role.MIXED, kv_blocks=2048, max_running=16)
    pace = Pace(shape="llama-3.1-8b", accelerator="l4", speedup=2.0)
    paced = [ReplicaGroup(role=role, kv_blocks=2048, max_running=16, pace=pace) for role in (Role.PREFILL, Role.DECODE)]
    nodes = (NodeSpec(name="a", accelerator="l4", slots=1), NodeSpec(name="b", accelerator="l4", slots=1))
    models = (ModelSpec(name=MODEL, path=MODEL),)
    return {
        "unpaced": Arm(Fleet(name="unpaced", models=models, replicas=(unpaced,), slo=slo), ("step", "prefill", "decode", "hop_s")),
        "paced": Arm(
            Fleet(name="paced", models=models, nodes=nodes, replicas=tuple(paced), slo=slo), ("hop_s", "transfer_setup_s")
        ),
    }


class Ran(NamedTuple):
    """A live run."""

    timings: list[RequestTiming]
    facts: dict[str, Any]
    """How the machine was meanwhile: load average, and cores taken by whom."""


def trace(rates: Sequence[tuple[float, float]], lengths: tuple[Lengths, Lengths], seed: int) -> list[TraceRow]:
    """Poisson arrivals at (requests a second, seconds) one after the other."""
    prompt, output = lengths
    return list(Generator(steps=tuple(rates), prompt=prompt, output=output).rows(seed))


def carried_rps(fleet: Fleet, world: World, lengths: tuple[Lengths, Lengths]) -> float:
    """Requests a second that the fleet serves while it has more than it can do."""
    return _rate_rps(replay(fleet, burst(lengths), world).timings)


def burst(lengths: tuple[Lengths, Lengths]) -> list[TraceRow]:
    """More than any of the fleets can do at once."""
    return trace([(1000.0 * SATURATING, 1.0)], lengths, BURST_SEED)[:SATURATING]


def _rate_rps(timings: Sequence[RequestTiming]) -> float:
    return len(timings) / max(one.last_token_s or 0.0 for one in timings)


def run_live(up: LiveFleet, rows: Sequence[TraceRow], seed: int) -> Ran:
    """Send the rows, and note what the machine did. seed: of the prompts, another for each run: none finds another's KV cached."""
    taken = [_cpu_s(up.processes()), time.process_time(), _busy_s()]
    began_s = time.monotonic()
    load = asyncio.run(client.run(rows, msgspec.structs.replace(up.target, seed=seed)))
    lasted_s = time.monotonic() - began_s
    fleet_s, client_s, all_s = (
        now - before for now, before in zip((_cpu_s(up.processes()), time.process_time(), _busy_s()), taken, strict=True)
    )
    cores = {"fleet": fleet_s, "client": client_s, "others": max(0.0, all_s - fleet_s - client_s)}
    lag_s = sorted(sample.send_lag_s for sample in load.samples)
    facts = {
        "requests": len(rows),
        "completed": sum(sample.timing.completed for sample in load.samples),
        "rate_rps": len(rows) / rows[-1].arrival_s,
        "load_average": os.getloadavg()[0],
        "cores": {name: seconds / lasted_s for name, seconds in cores.items()},
        "send_lag_p90_s": lag_s[int(0.9 * len(lag_s))],
    }
    return Ran([sample.timing for sample in load.samples], facts)


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _busy_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.system + times.nice + times.irq + times.softirq + times.steal


def tables_of(arm: Arm, model: Path) -> dict[str, StepTable]:
    """By role: of a paced group as its pace says, of another as measured in this process, alone."""
    tables = {}
    for group in arm.fleet.replicas:
        if group.pace is not None:
            tables[group.role.value] = step_table_of(performance_of(group.pace))
        else:
            served = ModelSpec(name=MODEL, path=str(model))
            points, engine = measured(group, served, 2, 512, None, lambda done, of: None)
            tables[group.role.value] = fitted_table(points, engine, group.role.value, group, served)
    return tables


def layout_of(model: Path, block_tokens: int) -> KvLayout:
    """Of a checkpoint's KV, from its config."""
    config = json.loads((model / "config.json").read_bytes())
    heads = config["num_attention_heads"]
    return KvLayout(
        layers=config["num_hidden_layers"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        block_tokens=block_tokens,
    )


class Found(NamedTuple):
    """Of one arm."""

    fitted: Fitted
    left: float
    """Mean error on the calibration trace itself."""
    calibration: dict[str, Any]
    agreements: list[Agreement]
    alone: list[Agreement]
    """The same live runs against step times measured alone and the world's usual delays."""
    facts: list[dict[str, Any]]


def judge(arm: Arm, model: Path, seconds: float, told: Console) -> Found:
    """Calibrate and compare one arm."""
    fleet = arm.fleet
    tables = tables_of(arm, model)
    layouts = {group.role.value: layout_of(model, group.block_tokens) for group in fleet.replicas}
    base = World(layouts=layouts, replica_speed_sd=0.0, startup_sd=0.0, link_bytes_per_s=HOST_BYTES_S)
    with tempfile.TemporaryDirectory() as folder:
        alone = Fitted().world(tables, base, Path(folder))
        with live_fleet(fleet, model) as up:
            seen, facts = calibrate(up, seconds)
            best, left = fitted(arm.fitted, fleet, tables, base, seen)
            told.print(f"{fleet.name}: fitted {best}, {left:.1%} off on the calibration traces; {facts}")
            return _judged(arm, up, tables, base, best, left, facts, alone, seconds, told)


def calibrate(up: LiveFleet, seconds: float) -> tuple[list[Seen], dict[str, Any]]:
    """A burst, which tells what the fleet carries, and a trace in stages of rising load; and how the machine was meanwhile."""
    run_live(up, trace([WARM], CALIBRATION, WARM_SEED), WARM_SEED)
    rows = burst(CALIBRATION)
    saturated = run_live(up, rows, BURST_SEED)
    carried = _rate_rps(saturated.timings)
    part_s = 1.5 * seconds / len(STAGES)
    rising = trace([(share * carried, part_s) for share in STAGES], CALIBRATION, CALIBRATION_SEED)
    ran = run_live(up, rising, CALIBRATION_SEED)
    ends_s = [part_s * (number + 1) for number in range(len(STAGES))]
    found = [Seen(rows, saturated.timings, [1.0]), Seen(rising, ran.timings, ends_s)]
    return found, {**ran.facts, "carried_rps": carried}


def _judged(
    arm: Arm,
    up: LiveFleet,
    tables: Mapping[str, StepTable],
    base: World,
    best: Fitted,
    left: float,
    calibration: dict[str, Any],
    alone: World,
    seconds: float,
    told: Console,
) -> Found:
    agreements, unfitted, facts = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        world = best.world(tables, base, Path(folder))
        carried = carried_rps(arm.fleet, world, UNSEEN)
        for number, share in enumerate(LOADS):
            seed = UNSEEN_SEED + number
            rows = trace([(share * carried, seconds)], UNSEEN, seed)
            ran = run_live(up, rows, seed)
            name = f"{share:.0%}, {share * carried:.1f}/s"
            agreements.append(agreement(name, ran.timings, replay(arm.fleet, rows, world).timings))
            unfitted.append(agreement(name, ran.timings, replay(arm.fleet, rows, alone).timings))
            facts.append(ran.facts)
            told.print(f"{arm.fleet.name} at {name}: {ran.facts}")
    return Found(best, left, calibration, agreements, unfitted, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each judged load; calibration takes half as long again")
    parser.add_argument("--arms", nargs="+", choices=list(arms()), default=list(arms()))
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")
    told = Console(stderr=True)
    model = ensure(PRESET)
    found = {name: judge(arms()[name], model, arguments.seconds, told) for name in arguments.arms}
    shown = Console(width=140)
    for name, one in found.items():
        shown.print(table(f"{name}: calibrated on one trace, judged on others", one.agreements))
        shown.print(table(f"{name}: with step times measured alone and the usual delays, nothing fitted", one.alone))
    if arguments.json:
        print(json.dumps(_json(found)))


def _json(found: Mapping[str, Found]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, one in found.items():
        loads = [
            {
                "load": share,
                **facts,
                "live_s": each.live_s,
                "simulated_s": each.simulated_s,
                "error": each.errors,
                "mean_error": each.mean_error,
            }
            for share, facts, each in zip(LOADS, one.facts, one.agreements, strict=True)
        ]
        shown[name] = {
            "mean_error": mean_error(one.agreements),
            "largest_error": max(abs(error) for each in one.agreements for error in each.errors.values()),
            "mean_error_unfitted": mean_error(one.alone),
            "mean_error_on_calibration_trace": one.left,
            "fitted": msgspec.to_builtins(one.fitted),
            "calibration": one.calibration,
            "loads": loads,
        }
    return shown


if __name__ == "__main__":
    sys.exit(main())
