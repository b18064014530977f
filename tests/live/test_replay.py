"""Five minutes of a published trace, replayed against a whole emulated fleet: every request completes, and the report says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.live.conftest import LiveFleet, mobula

pytestmark = pytest.mark.timeout(500)  # The fleet starts inside a fixture.

REQUESTS = 1445
"""Rows of the trace's first five minutes."""


@pytest.fixture(scope="module")
def trace(data_dir: Path) -> Path:
    return data_dir / "azure_llm_2023" / "AzureLLMInferenceTrace_conv.csv"


@pytest.fixture(scope="module")
def fleet(trace: Path, start_fleet: Callable[..., LiveFleet], model_dir: object) -> LiveFleet:
    """Fast enough for a hundred requests a second, most of them short."""
    pace = {"shape": "llama-3.1-8b", "accelerator": "h100", "speedup": 4.0}
    config = {
        "models": [{"name": "tiny", "path": str(model_dir)}],
        "replicas": [
            {"role": role, "count": count, "engine": "emulated", "pace": pace} for role, count in (("prefill", 1), ("decode", 2))
        ],
        "gateway": {"max_queue": REQUESTS, "queue_timeout_s": 120},
    }
    return start_fleet("replay", config)


def test_five_minutes_of_azure_conversations_all_complete(fleet: LiveFleet, trace: Path, tmp_path: Path) -> None:
    plot = tmp_path / "run.png"
    scaling = ("--scale-rate", "20", "--scale-prompt", "0.1", "--scale-output", "0.2")
    said = ("--url", fleet.url, "--minutes", "5", *scaling, "--json", "--plot", str(plot))
    done = mobula("replay", str(trace), *said, home=fleet.home)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["requests"], report["completed"], report["errors"]) == (REQUESTS, REQUESTS, {})
    assert report["output_tokens"] == report["output_tokens_asked"]
    assert report["workload"] == f"{trace}, minutes 0 to 5: prompts x 0.1, outputs x 0.2, rate x 20"
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
