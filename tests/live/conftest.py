"""Real fleets: `mobula up` of torch replicas in their own processes, spoken to through the gateway's port."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import yaml

START_TIMEOUT_S = 240
SETTLE_TIMEOUT_S = 15
APART = {"settings": {"transfer_setup_s": 0.0, "link_bytes_per_s": 1e12, "host_bytes_per_s": 1e12}}
"""Routing that counts transfers as free, so that prompts are prefilled apart on the faster machine."""


@dataclass(frozen=True, kw_only=True)
class LiveFleet:
    """A fleet that is up."""

    name: str
    url: str
    home: Path
    model: Path

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)

    def async_client(self) -> openai.AsyncOpenAI:
        limits = httpx.Limits(max_connections=None)
        http = httpx.AsyncClient(limits=limits, timeout=100)
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, http_client=http)

    def status(self) -> dict:
        done = mobula("status", self.name, "--json", home=self.home)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def replicas(self, role: str | None = None) -> list[dict]:
        """Rows of the replicas that are ready."""
        rows = self.status()["replicas"]
        return [row for row in rows if row["phase"] == "ready" and (role is None or row["role"] == role)]

    def metric(self, replica: dict, name: str) -> float:
        """Sum of a metric's samples at the replica's worker."""
        text = httpx.get(replica["metrics_url"], timeout=10).text
        pattern = re.compile(rf'^{name}\{{[^}}]*replica="{re.escape(replica["replica_id"])}"[^}}]*\}} (\S+)$', re.MULTILINE)
        return sum(float(value) for value in pattern.findall(text))


def torch_group(role: str, count: int, model: str = "", **more: object) -> dict:
    """Torch replicas: those that prefill as an H100, the others as an L4, both sped up to what two cores can hold."""
    pace = {"shape": "llama-3.1-8b", "accelerator": "h100" if role == "prefill" else "l4", "speedup": 20.0}
    return {"role": role, "count": count, "model": model, "engine": "torch", "kv_blocks": 1024, "pace": pace, **more}


def mobula(*arguments: str, home: Path, timeout_s: float = START_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MOBULA_HOME": str(home)}
    command = [sys.executable, "-m", "cli.main", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)


def eventually(holds: Callable[[], bool], what: str, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
    """Wait for what another process will do; there is no event to await across processes."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The tiny dense model, trained briefly: its text matters less here than that its greedy margins are wide."""
    from workers.engines.torch_engine.tiny_model import ensure

    return ensure("tiny-dense", steps=60)


@pytest.fixture(scope="module")
def start_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LiveFleet]]:
    """Starts fleets, and ends every one of them and its processes after the module's tests."""
    started: list[tuple[str, Path]] = []

    def start(name: str, config: dict) -> LiveFleet:
        folder = tmp_path_factory.mktemp(name)
        port = free_port()
        config = {"name": name, **config, "gateway": {"port": port, "allow_anonymous": True, **config.get("gateway", {})}}
        path = folder / "cluster.yaml"
        path.write_text(yaml.safe_dump(config))
        started.append((name, folder))
        done = mobula("up", "-f", str(path), home=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return LiveFleet(name=name, url=f"http://127.0.0.1:{port}", home=folder, model=Path(config["models"][0]["path"]))

    yield start
    for name, folder in started:
        mobula("down", name, home=folder)
    homes = {str(folder) for _, folder in started}
    leftover = [process for process in psutil.process_iter() if home_of(process) in homes]
    assert not leftover, f"mobula down left {leftover}"


def home_of(process: psutil.Process) -> str | None:
    """The MOBULA_HOME it was started with, which all of a fleet's processes inherit."""
    with contextlib.suppress(psutil.Error):
        return process.environ().get("MOBULA_HOME")
    return None


def kill(replica: dict) -> None:
    os.kill(replica["pid"], signal.SIGKILL)


def freeze(replica: dict) -> None:
    os.kill(replica["pid"], signal.SIGSTOP)
