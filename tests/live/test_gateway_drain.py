"""SIGTERM sent straight to a gateway replica's process, as a node's shutdown would."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest

from tests.live.conftest import LiveFleet, eventually, home_of

pytestmark = pytest.mark.timeout(400)  # Fleets start inside fixtures.

TOKENS = 800


@pytest.fixture(scope="module")
def fleet(start_fleet: Callable[..., LiveFleet], model_dir: object) -> LiveFleet:
    config = {
        "models": [{"name": "tiny", "path": str(model_dir)}],
        "replicas": [{"role": "mixed", "engine": "emulated", "pace": {"shape": "llama-3.1-8b", "accelerator": "h100"}}],
    }
    return start_fleet("drain", config)


def gateways(fleet: LiveFleet) -> set[psutil.Process]:
    mine = (process for process in psutil.process_iter() if home_of(process) == str(fleet.home))
    return {process for process in mine if process.name().startswith("ray::ServeReplica")}


def stream(fleet: LiveFleet) -> Iterator[str]:
    body = {"model": "tiny", "prompt": "And he said", "max_tokens": TOKENS, "stream": True}
    with httpx.stream("POST", f"{fleet.url}/v1/completions", json=body, timeout=60) as response:
        yield from (line for line in response.iter_lines() if line)


def refuses(fleet: LiveFleet) -> bool:
    try:
        return httpx.get(f"{fleet.url}/health", timeout=5).status_code == 503
    except httpx.TransportError:
        return True


def test_sigterm_refuses_the_new_finishes_what_streams_and_is_replaced(fleet: LiveFleet) -> None:
    (gateway,) = gateways(fleet)
    events = stream(fleet)
    received = [next(events)]
    os.kill(gateway.pid, signal.SIGTERM)
    eventually(lambda: refuses(fleet), "the drained gateway takes nothing new")
    received.extend(events)
    assert received[-1] == "data: [DONE]"
    assert len(received) == TOKENS + 1
    gateway.wait(20)
    eventually(lambda: not refuses(fleet), "Serve starts another", timeout_s=60)
    assert gateway not in gateways(fleet)
