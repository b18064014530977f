"""`mobula up --address`: a fleet in somebody else's Ray, its gateway and transports under TLS, and the Ray left as it was."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest
import yaml

from cli.fleet_home import Record
from cli.joined_ray import ENVIRONMENT
from tests.certificates import write_certificates
from tests.live.conftest import START_TIMEOUT_S, LiveFleet, eventually, free_port, mobula

END_S = 60


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a Ray of one node, labelled as the fleet's, and the process that holds it. Its token is in the environment."""
    for name, value in {**ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}.items():
        monkeypatch.setenv(name, value)
    directory = tempfile.mkdtemp(prefix="mobula-test-", dir="/tmp")
    address = f"127.0.0.1:{free_port()}"
    options = [f"--port={address.split(':')[1]}", "--node-ip-address=127.0.0.1", "--labels=mobula-node=a", "--num-cpus=2"]
    options += ["--object-store-memory=80000000", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={directory}"]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            if b"Ray runtime started" in line:
                break
        holder = psutil.Process(process.pid)
        yield address, holder
        below = holder.children(recursive=True)
        process.terminate()
        process.wait(END_S)
        for left in psutil.wait_procs(below, END_S)[1]:
            left.kill()
    shutil.rmtree(directory, ignore_errors=True)


def ours(holder: psutil.Process) -> list[str]:
    """Names of the actors' processes in a Ray."""
    names = [process.name() for process in holder.children(recursive=True)]
    return [name for name in names if name.startswith("ray::") and "Agent" not in name and "IDLE" not in name]


def write_config(directory: Path, model_dir: Path, **more: object) -> Path:
    """One prefill and one decode replica, emulated, on node `a`."""
    pace = {"shape": "llama-3.1-8b", "accelerator": "h100", "speedup": 20.0}
    fleet = {
        "name": "joined",
        "models": [{"name": "tiny", "path": str(model_dir)}],
        "nodes": [{"name": "a"}],
        "replicas": [{"role": role, "engine": "emulated", "pace": pace} for role in ("prefill", "decode")],
        "gateway": {"port": free_port(), "allow_anonymous": True},
    }
    config = directory / "cluster.yaml"
    config.write_text(yaml.safe_dump({**fleet, **more}))
    return config


@pytest.mark.timeout(2 * START_TIMEOUT_S)
def test_a_joined_fleet_serves_under_tls_and_leaves_the_ray_as_it_was(ray_cluster, tmp_path, model_dir, monkeypatch):
    address, holder = ray_cluster
    write_certificates(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    config = write_config(tmp_path, model_dir, transport={"tls_dir": "."})
    before = ours(holder)
    up = mobula("up", "-f", str(config), "--address", address, home=tmp_path)
    assert up.returncode == 0, up.stderr
    joined = LiveFleet(name="joined", url=up.stdout.strip(), home=tmp_path, model=model_dir)
    said = joined.client().completions.create(model="tiny", prompt=[5] * 40, max_tokens=8, extra_body={"ignore_eos": True})
    assert said.usage.completion_tokens == 8
    (own,) = joined.status()["gateways"]
    for url in (joined.url, own):
        assert httpx.get(f"{url}/health", timeout=10).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health".replace("https:", "http:"), timeout=10)
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 16, "output_length": 4, "hash_ids": [0]}\n')
    replayed = mobula("replay", str(trace), "--url", joined.url, home=tmp_path)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert {row["role"] for row in joined.replicas()} == {"prefill", "decode"}

    port = int(joined.url.rsplit(":", 1)[1])
    write_config(tmp_path, model_dir, name="second", gateway={"port": port, "allow_anonymous": True})
    second = mobula("up", "-f", str(config), "--address", address, home=tmp_path)
    assert (second.returncode, second.stdout) == (2, "")
    assert f"gateway.port {port} on 127.0.0.1 is taken by another program" in second.stderr
    assert "cluster.errors" not in second.stderr
    assert httpx.get(f"{joined.url}/health", timeout=10).status_code == 200

    assert mobula("down", "joined", home=tmp_path).returncode == 0
    assert holder.is_running()
    eventually(lambda: ours(holder) == before, "every actor of the fleet ends", END_S)
    assert sorted(os.listdir(tmp_path / "joined")) == ["fleet.json", "journal.sqlite", "supervisor.log"]


@pytest.mark.timeout(2 * START_TIMEOUT_S)
def test_down_closes_the_gateway_of_a_supervisor_that_was_killed(ray_cluster, tmp_path, model_dir):
    address, holder = ray_cluster
    config = write_config(tmp_path, model_dir)
    up = mobula("up", "-f", str(config), "--address", address, home=tmp_path)
    assert up.returncode == 0, up.stderr
    record = msgspec.json.decode((tmp_path / "joined/record.json").read_bytes(), type=Record)
    psutil.Process(record.supervisor.pid).kill()
    assert mobula("down", "joined", home=tmp_path).returncode == 0
    eventually(lambda: not [name for name in ours(holder) if "mobula" in name or "Worker" in name], "all of ours ends", END_S)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(up.stdout.rsplit(":", 1)[1]))) != 0


@pytest.mark.timeout(START_TIMEOUT_S)
def test_a_ray_without_the_named_nodes_is_refused(ray_cluster, tmp_path, model_dir):
    address, holder = ray_cluster
    config = write_config(tmp_path, model_dir, nodes=[{"name": "elsewhere"}])
    up = mobula("up", "-f", str(config), "--address", address, home=tmp_path)
    assert (up.returncode, up.stdout) == (2, "")
    assert "no Ray node carries the label mobula-node=elsewhere" in up.stderr
    assert ours(holder) == []
