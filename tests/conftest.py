"""What all tests share: where the data is, and settings that must stand before a library reads them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

signal.signal(signal.SIGINT, signal.default_int_handler)  # Ignored in a shell's background jobs, and so in all they start.

# A busy machine is slow; only what is wrong may fail.
settings.register_profile("unhurried", deadline=None, suppress_health_check=(HealthCheck.too_slow,))
settings.load_profile("unhurried")

ROOT = Path(__file__).parents[1]


SIMULATING = ("simulator", "reproductions", "benchmarks", "cli")
"""Folders of tests that simulate."""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile the simulator before the first test's clock runs: it takes a minute, once."""
    if not session.config.option.collectonly and any(set(item.path.parts) & {*SIMULATING} for item in session.items):
        from simulator.engines import warm

        warm()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The shared traces and profiles; a test that asks for them skips where they are not."""
    path = Path(os.environ.get("MOBULA_DATA", ROOT / ".." / "shared" / "data")).resolve()
    if not (path / "manifest.md").exists():
        pytest.skip(f"no shared data at {path}: set MOBULA_DATA")
    return path


@pytest.fixture(scope="session")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The journal of `tests.controller.scripted`, to be read only."""
    from tests.controller.scripted import play

    play(path := tmp_path_factory.mktemp("played") / "journal.sqlite").close()
    return path
