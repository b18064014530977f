"""A real fleet of emulated replicas for a benchmark: up in a home of its own on free ports, asked, watched, and down."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil

from benchmarks.gateway import save_tokenizer
from cli.ask import ask
from cli.fleet_home import FleetHome
from cluster.fleet import Fleet, GatewaySpec, ModelSpec
from controller.status import FleetStatus
from workloads.client import Target

MODEL = "m"


class LiveFleet(NamedTuple):
    """One that is up."""

    home: FleetHome
    url: str

    @property
    def target(self) -> Target:
        return Target(url=self.url, model=MODEL)

    def status(self) -> FleetStatus:
        """Raises Unreachable."""
        return ask(self.home, "status", FleetStatus)

    def processes(self) -> list[psutil.Process]:
        """All that the fleet consists of, Ray's own among them."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("MOBULA_HOME") == str(self.home.path.parent) and process.pid != os.getpid():
                    found.append(process)
        return found


def model_in(directory: str) -> ModelSpec:
    """A model that has a tokenizer and nothing else, which is all that a gateway before emulated replicas reads."""
    save_tokenizer(Path(directory))
    return ModelSpec(name=MODEL, path=directory)


@contextlib.contextmanager
def live_fleet(fleet: Fleet, model: Path | None = None) -> Iterator[LiveFleet]:
    """The fleet as given but for its models and its gateway's port. Its progress goes to stderr.

    model: the one checkpoint that it serves; None is enough for emulated replicas.
    """
    before = os.environ.get("MOBULA_HOME")
    with tempfile.TemporaryDirectory(prefix="mobula-bench-", dir="/tmp") as directory:  # Sockets' paths must be short.
        os.environ["MOBULA_HOME"] = directory
        gateway = GatewaySpec(port=free_port(), allow_anonymous=True)
        served = model_in(directory) if model is None else ModelSpec(name=MODEL, path=str(model))
        fleet = msgspec.structs.replace(fleet, models=(served,), gateway=gateway)
        config = Path(directory, "cluster.yaml")
        config.write_bytes(msgspec.yaml.encode(fleet))
        try:
            _mobula("up", "-f", str(config))
            yield LiveFleet(FleetHome(fleet.name), f"http://127.0.0.1:{gateway.port}")
        finally:
            if FleetHome(fleet.name).record() is not None:
                _mobula("down", fleet.name)
            if before is None:
                del os.environ["MOBULA_HOME"]
            else:
                os.environ["MOBULA_HOME"] = before


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _mobula(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "cli.main", *arguments], stdout=sys.stderr, check=True)
