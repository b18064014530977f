"""Requests simulated per CPU second, beside the peer's where it is installed: `python -m benchmarks.simulator [--json]`.

Workload A, as `benchmarks.simulator_peer` gives it to the peer: Poisson arrivals of 4 requests/s a replica, 1,024 prompt and 128
output tokens, an 8B-class model, blocks of 64 tokens, 8,192 tokens a step. Ours runs the live router, a view of the fleet, load
reports of all replicas five times a second, admission, and but for the round-robin arms the controller's pass each second. CPU
seconds are user and system of the simulation itself, its made-up arrivals included; starting Python and compiling are not. Each arm
is a process of its own, and the best of its rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks import simulator_peer as peer
from benchmarks.simulator_peer import ARMS, MEMORY_ARM, Arm
from cluster.fleet import Fleet, GatewaySpec, ModelSpec, NodeSpec, Pace, ReplicaGroup
from cluster.replica import Role
from cluster.slo import Slo
from policies.route import Ask, Choice, Rejection, Route
from policies.routing_view import RoutingView
from simulator.simulation import Setup, Simulation
from workloads.generators import parse_generator

BARS = {"requests_per_cpu_s_64": 12_100, "requests_per_cpu_s_64_kv": 9_100, "requests_per_cpu_s_1000_kv": 3_900}
PEAK_RSS = "peak_rss_mb_200k"
PER_NODE = 8
GROUP = ReplicaGroup(
    role=Role.MIXED,
    engine="emulated",
    pace=Pace(shape="llama-3.1-8b", accelerator="h100"),
    kv_blocks=6_000,
    block_tokens=64,
    max_running=256,
    step_budget_tokens=8192,
)


class InTurn:
    """A router that looks at nothing: the replicas one after the other."""

    reads_index = False

    def __init__(self) -> None:
        self._next = 0

    def route(self, ask: Ask, view: RoutingView) -> Route | Rejection:
        replica = view.replicas[self._next % len(view.replicas)]
        assert replica is not None, "the fleet of this benchmark stays as it is"
        self._next += 1
        return Route(
            decode=Choice(replica_id=replica.replica_id, terms={}, score=0.0),
            decode_runner_up=None,
            prefill=None,
            prefill_runner_up=None,
            reason="its turn",
            predicted_ttft_s=0.0,
            predicted_tpot_s=0.0,
            cached_tokens=0,
            uncached_tokens=ask.prompt_tokens,
        )


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one arm."""

    requests_per_cpu_s: float
    peak_rss_mb: float
    ttft_mean_s: float
    tpot_mean_s: float
    cached_share: float
    completed: int


def fleet_of(arm: Arm) -> Fleet:
    group = msgspec.structs.replace(GROUP, count=arm.replicas)
    nodes = tuple(NodeSpec(name=f"node-{i}", accelerator="h100", slots=PER_NODE) for i in range(-(-arm.replicas // PER_NODE)))
    return Fleet(
        models=(ModelSpec(name="m", path="m"),),
        nodes=nodes,
        replicas=(group,),
        gateway=GatewaySpec(allow_anonymous=True),
        slo={"default": Slo(ttft_s=1.0, tpot_s=0.05)},
    )


def simulate(arm: Arm, requests: int) -> Figures:
    """One arm, in this process."""
    shared = round(arm.shared_prefix * peer.PROMPT_TOKENS)
    text = (
        f"poisson:rate={arm.rate_rps},minutes={requests / arm.rate_rps / 60},"
        f"prompt=fixed({peer.PROMPT_TOKENS}),output=fixed({peer.OUTPUT_TOKENS})"
        + (f",shared=1,prefix={shared},prefixes={arm.prefixes}" if shared else "")
    )
    in_turn = arm.router == "round_robin"
    setup = Setup(fleet=fleet_of(arm), warm_up_s=0.0, control=not in_turn, label=text)
    result = Simulation(setup, parse_generator(text).rows(peer.SEED), router=InTurn() if in_turn else None).run()
    (of_all,) = result.classes.values()
    assert of_all.ttft_s is not None, "nothing was answered"
    assert of_all.tpot_s is not None, "nothing was answered"
    return Figures(
        requests_per_cpu_s=result.requests_per_cpu_s,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        ttft_mean_s=of_all.ttft_s.mean,
        tpot_mean_s=of_all.tpot_s.mean,
        cached_share=result.cached_share,
        completed=result.completed,
    )


def measured(arm: Arm, rounds: int) -> Figures:
    """The best of so many processes."""
    command = [sys.executable, "-m", "benchmarks.simulator", "--arm", msgspec.json.encode(arm).decode()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = [
        msgspec.json.decode(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout.splitlines()[-1], type=Figures
        )
        for _ in range(rounds)
    ]
    return max(found, key=lambda one: one.requests_per_cpu_s)


def measure(rounds: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, arm in ARMS.items():
        one = measured(arm, rounds)
        figures[name] = round(one.requests_per_cpu_s, 1)
        print(f"{name}: {one}", file=sys.stderr, flush=True)
    figures[PEAK_RSS] = round(measured(MEMORY_ARM, 1).peak_rss_mb, 1)
    theirs = peer.figures(rounds)
    return figures | {f"peer_{name}": value for name, value in (theirs or {}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.arm:
        arm = msgspec.json.decode(asked.arm, type=Arm)
        simulate(arm, min(arm.requests, 500))  # Compiles, or loads what was compiled.
        print(msgspec.json.encode(simulate(arm, arm.requests)).decode())
        return
    found = measure(asked.rounds)
    _print(found)
    if asked.json:
        print(json.dumps(found))


def _print(found: dict[str, float]) -> None:
    table = Table(title="Requests simulated per CPU second, and the most memory (MB) with 200,000 of them")
    for column in ("", "Mobula", "peer, here", "ratio", "peer, as stated"):
        table.add_column(column, justify="right" if column else "left")
    for name in (*ARMS, PEAK_RSS):
        theirs = found.get(f"peer_{name}")
        ratio = "" if theirs is None else f"{found[name] / theirs:.2f}"
        bar = f"{BARS[name]:,}" if name in BARS else ""
        table.add_row(name, f"{found[name]:,.0f}", "" if theirs is None else f"{theirs:,.0f}", ratio, bar)
    Console().print(table)


if __name__ == "__main__":
    main()
