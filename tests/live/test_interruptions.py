"""Ctrl-C while a fleet starts, and a supervisor that is killed: nothing of it stays behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from cli.fleet_home import FleetHome
from cli.local_ray import processes_in
from tests.live.conftest import START_TIMEOUT_S, eventually, free_port, mobula

END_S = 60


@pytest.fixture
def config(tmp_path, monkeypatch, model_dir) -> Path:
    """A cluster.yaml of one emulated replica, with a home of its own."""
    monkeypatch.setenv("MOBULA_HOME", str(tmp_path))
    pace = {"shape": "llama-3.1-8b", "accelerator": "h100"}
    fleet = {
        "name": "cut",
        "models": [{"name": "tiny", "path": str(model_dir)}],
        "replicas": [{"role": "mixed", "engine": "emulated", "pace": pace}],
        "gateway": {"port": free_port(), "allow_anonymous": True},
    }
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(fleet))
    return tmp_path / "cluster.yaml"


@pytest.mark.timeout(START_TIMEOUT_S + END_S)
def test_ctrl_c_while_the_gateway_opens_leaves_nothing(config):
    home = FleetHome("cut")
    command = [sys.executable, "-m", "cli.main", "up", "-f", str(config)]
    with subprocess.Popen(command, start_new_session=True) as up:
        opening = "phase: Opening the gateway"
        eventually(lambda: home.log_path.exists() and opening in home.log_path.read_text(), opening, START_TIMEOUT_S)
        directory = Path(home.record().directory)
        os.killpg(up.pid, signal.SIGINT)
        assert up.wait(END_S) == 130
    assert processes_in(directory) == []
    assert not directory.exists()
    assert home.record() is None


@pytest.mark.timeout(START_TIMEOUT_S + END_S)
def test_down_ends_what_a_killed_supervisor_left(config, tmp_path):
    home = FleetHome("cut")
    up = mobula("up", "-f", str(config), home=tmp_path)
    assert up.returncode == 0, up.stderr
    record = home.record()
    supervisor = psutil.Process(record.supervisor.pid)
    supervisor.kill()
    supervisor.wait(END_S)
    assert processes_in(Path(record.directory))
    assert "its workers still run" in mobula("up", "-f", str(config), home=tmp_path).stderr
    assert mobula("down", home=tmp_path).returncode == 0
    assert processes_in(Path(record.directory)) == []
    assert not Path(record.directory).exists()


@pytest.mark.timeout(START_TIMEOUT_S + END_S)
def test_sigterm_ends_a_fleet_in_the_foreground_in_order(config):
    home = FleetHome("cut")
    command = [sys.executable, "-m", "cli.main", "up", "-f", str(config), "--foreground"]
    with subprocess.Popen(command, start_new_session=True) as up:
        eventually(lambda: home.log_path.exists() and "ready: " in home.log_path.read_text(), "ready", START_TIMEOUT_S)
        directory = Path(home.record().directory)
        up.terminate()
        assert up.wait(END_S) == 0
    assert processes_in(directory) == []
    assert home.record() is None
