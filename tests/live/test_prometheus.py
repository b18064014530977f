"""A fleet that reads Prometheus and one that reads its own window, under the same load: the same targets, within a few passes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from controller.journal import Journal
from tests.live.conftest import LiveFleet, eventually, mobula

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no `prometheus` on the PATH: apt-get install prometheus"),
]

LOAD = "gamma:rate=20,burstiness=50,minutes=0.75,prompt=fixed(200),output=fixed(60)"
PACE = {"shape": "llama-3.1-8b", "accelerator": "h100"}
NEEDED = 4
"""As many as the fleet may have, and fewer than it could use: each holds at most 4 requests of about half a second."""
LAG_PASSES = 6  # A scrape interval, Prometheus' next answer, and the noise of two runs.
SCALED_S = 60


@pytest.fixture(scope="module")
def fleets(start_fleet: Callable[..., LiveFleet], model_dir: Path) -> dict[str, LiveFleet]:
    group = {"engine": "emulated", "pace": PACE, "kv_blocks": 2048, "max_running": 4, "startup_s": 5}
    config = {
        "models": [{"name": "tiny", "path": str(model_dir)}],
        "nodes": [{"name": "a"}],
        "replicas": [{**group, "role": "mixed", "min_replicas": 1, "max_replicas": 4}],
    }
    return {
        "window": start_fleet("window", config),
        "prometheus": start_fleet("prometheus", {**config, "telemetry": {"local_prometheus": True}}),
    }


def loaded(fleet: LiveFleet) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cli.main", "replay", LOAD, "--url", fleet.url, "--json"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wanted(fleet: LiveFleet) -> int:
    return fleet.status()["groups"][0]["wanted"]


def reached(fleet: LiveFleet, least: int) -> int:
    """Passes from the first arrivals that it knew of to the target."""
    began = None
    for entry in Journal(fleet.home / fleet.name / "journal.sqlite", read_only=True).entries():
        (workload,) = entry.snapshot.workloads
        if began is None and any(bucket.requests for bucket in workload.buckets):
            began = entry.number
        if max(entry.decision.targets.values()) >= least:
            assert began is not None
            return entry.number - began
    raise AssertionError(f"{fleet.name} never wanted {least}")


def test_both_reach_the_same_targets_within_the_stated_lag(fleets: dict[str, LiveFleet]) -> None:
    assert fleets["prometheus"].status()["prometheus_url"]
    clients = [loaded(fleet) for fleet in fleets.values()]
    for name, fleet in fleets.items():
        eventually(lambda fleet=fleet: wanted(fleet) >= NEEDED, f"{name} wants {NEEDED}", SCALED_S)
    for client in clients:
        client.wait(120)
    passes = {name: reached(fleet, NEEDED) for name, fleet in fleets.items()}
    assert passes["prometheus"] - passes["window"] <= LAG_PASSES
    assert wanted(fleets["prometheus"]) == wanted(fleets["window"])


def test_without_prometheus_the_target_is_held_and_requests_are_served(fleets: dict[str, LiveFleet]) -> None:
    fleet = fleets["prometheus"]
    before = wanted(fleet)
    assert mobula("chaos", "stop-prometheus", "--fleet", fleet.name, home=fleet.home).returncode == 0

    def held() -> bool:
        last = Journal(fleet.home / fleet.name / "journal.sqlite", read_only=True).last()
        return last.snapshot.workloads[0].age_s > 15.0

    eventually(held, "telemetry is stale", SCALED_S)
    assert wanted(fleet) == before
    answer = fleet.client().completions.create(model="tiny", prompt=[5] * 20, max_tokens=4, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 4
