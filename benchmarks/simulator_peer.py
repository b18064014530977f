"""The peer that the simulator is measured beside: the offline replay of NVIDIA Dynamo's mocker, one arm a process.

The peer makes its requests up itself, Poisson from a seed, which is its fastest way: read from a trace file, the same work took it
2 to 14 % more CPU and a quarter more memory. It simulates on one thread and steps every iteration of every replica; its KV router
knows all caches at once and draws lots between equals, so that its runs differ a little.

A replica is `ENGINE`, timed by the polynomial that is its default: a step takes 16.5 + 0.01518 n + 4.21e-7 n^2 ms for n prompt
tokens that no cache holds, and 5.74 + 54.01 p - 25.74 p^2 ms for the decodes in it, p being the part of its KV that they fill; the
two add up. Source: aisimulate, crates/core/src/engine/common/perf_model.rs. That is 32.5 ms for a prompt of 1,024 tokens and 5.9 ms
for four decodes, near what an 8B model takes on an H100, of which reading 16 GB of weights at 3.35 TB/s is 4.8 ms. It is no
prediction for one: the peer knows no accelerator at these settings.

CPU seconds are user and system, of the call alone: fleet, requests, simulation and report, without starting Python or importing the
package (0.03 to 0.06 s). Memory is the process's highest resident set. Run by hand, this simulates one arm in its own process.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

PACKAGE, MODULE = "ai-dynamo-runtime", "dynamo._core"
NOT_INSTALLED = "peer not installed: pip install mobula[bench]"

PROMPT_TOKENS, OUTPUT_TOKENS = 1024, 128
RATE_RPS = 4.0
"""Requests a second for each replica."""
SEED = 42
ENGINE = {
    "backend": "vllm",
    "block_size": 64,
    "num_gpu_blocks": 16384,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "timing_model": {"type": "polynomial"},
}
"""The peer's defaults, said, so that another version of it does the same work: 1,048,576 tokens of KV a replica."""
ROUTER_MODES = {"round_robin": "round_robin", "kv": "kv_router"}

ROUNDS = 3  # The best of so many: what the machine can do, not what else it did.
TIMEOUT_S = 900.0  # Ten times the longest arm on 2 slow cores.


class Arm(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run of workload A: Poisson arrivals of equal prompts and outputs on a fleet of equal replicas."""

    replicas: int
    requests: int
    router: Literal["round_robin", "kv"]
    shared_prefix: float = 0.0
    """The part of each prompt that it has in common with others, 0 to 1."""
    prefixes: int = 1
    """How many different prefixes are shared, drawn alike, >= 1."""

    @property
    def rate_rps(self) -> float:
        return RATE_RPS * self.replicas


ARMS: Mapping[str, Arm] = {
    "requests_per_cpu_s_64": Arm(replicas=64, requests=50_000, router="round_robin"),
    "requests_per_cpu_s_1000": Arm(replicas=1000, requests=40_000, router="round_robin", shared_prefix=0.5),
    "requests_per_cpu_s_64_kv": Arm(replicas=64, requests=50_000, router="kv"),
    "requests_per_cpu_s_1000_kv": Arm(replicas=1000, requests=40_000, router="kv", shared_prefix=0.5),
}
MEMORY_ARM = Arm(replicas=64, requests=200_000, router="kv")


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What an arm took, and the means it reports, which show that it did the work."""

    requests_per_cpu_s: float
    peak_rss_mb: float
    """Of 2^20 bytes."""
    completed: int
    ttft_s: float
    tpot_s: float
    cached_share: float
    """Prompt tokens found in a cache, 0 to 1."""


def version() -> str | None:
    """The installed peer's; None where it is not installed."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def measured(arm: Arm, rounds: int = 1) -> Measured | None:
    """The best of so many runs of an arm, each in a process of its own; None where the peer is not installed.

    Raises RuntimeError with what the process wrote if it fails, and subprocess.TimeoutExpired after TIMEOUT_S.
    """
    return None if version() is None else _best(arm, rounds)


def figures(rounds: int = ROUNDS) -> dict[str, float] | None:
    """The rate of each of ARMS and `peak_rss_mb_200k`; None, and said on stderr, where the peer is not installed."""
    if version() is None:
        print(NOT_INSTALLED, file=sys.stderr)
        return None
    found = {name: _best(arm, rounds).requests_per_cpu_s for name, arm in ARMS.items()}
    return found | {"peak_rss_mb_200k": _run(MEMORY_ARM).peak_rss_mb}


def _best(arm: Arm, rounds: int) -> Measured:
    return max((_run(arm) for _ in range(rounds)), key=lambda run: run.requests_per_cpu_s)


def simulate(arm: Arm) -> Measured:
    """Has the peer simulate an arm in this process."""
    os.environ["DYN_LOG"] = "error"  # Read on import. The KV router otherwise writes a line for each request.
    peer = importlib.import_module(MODULE)
    before_s = _cpu_s()
    summary = peer.run_mocker_synthetic_trace_replay(PROMPT_TOKENS, OUTPUT_TOKENS, arm.requests, **_options(arm)).summary
    spent_s = _cpu_s() - before_s
    return Measured(
        requests_per_cpu_s=arm.requests / spent_s,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # Linux counts KiB.
        completed=summary["completed_requests"],
        ttft_s=summary["mean_ttft_ms"] / 1000,
        tpot_s=summary["mean_tpot_ms"] / 1000,
        cached_share=summary["prefix_cache_reused_ratio"],
    )


def _options(arm: Arm) -> dict[str, Any]:
    return {
        "extra_engine_args": {"engine": ENGINE},
        "num_workers": arm.replicas,
        "router_mode": ROUTER_MODES[arm.router],
        "request_rate": arm.rate_rps,
        "arrival_seed": SEED,
        "shared_prefix_ratio": arm.shared_prefix,
        "num_prefix_groups": arm.prefixes if arm.shared_prefix else 0,
    }


def _cpu_s() -> float:
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def _run(arm: Arm) -> Measured:
    command = [sys.executable, "-m", "benchmarks.simulator_peer", "--arm", msgspec.json.encode(arm).decode()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{PACKAGE} {version()} ended with {done.returncode} on {arm}: {done.stderr[-2000:]}")
    found = msgspec.json.decode(done.stdout.splitlines()[-1], type=Measured)
    if found.completed != arm.requests:
        raise RuntimeError(f"{PACKAGE} {version()} completed {found.completed} of {arm.requests} requests of {arm}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", type=lambda text: msgspec.json.decode(text, type=Arm), default=ARMS["requests_per_cpu_s_64"])
    options = parser.parse_args()
    if version() is None:
        sys.exit(NOT_INSTALLED)
    print(msgspec.json.encode(simulate(options.arm)).decode())


if __name__ == "__main__":
    main()
