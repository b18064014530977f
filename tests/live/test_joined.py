"""`mobula up --address`: a fleet in somebody else's Ray, its transports under TLS, which `mobula down` leaves as it was."""

import datetime
import ipaddress
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cli.fleet_home import Record
from cli.joined_ray import ENVIRONMENT
from tests.live.conftest import START_TIMEOUT_S, LiveFleet, eventually, free_port, mobula

END_S = 60


def write_certificates(directory: Path) -> None:
    """An authority and one certificate for 127.0.0.1, which gateway and workers show each other."""
    now = datetime.datetime.now(datetime.UTC)
    validity = now - datetime.timedelta(hours=1), now + datetime.timedelta(days=1)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])

    def builder(subject: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        built = x509.CertificateBuilder().issuer_name(authority_name).subject_name(subject).public_key(public_key)
        return built.serial_number(x509.random_serial_number()).not_valid_before(validity[0]).not_valid_after(validity[1])

    authority = builder(authority_name, authority_key.public_key())
    authority = authority.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mobula")])
    certificate = builder(subject, key.public_key()).add_extension(address, critical=False)
    pem = serialization.Encoding.PEM
    (directory / "ca.pem").write_bytes(authority.sign(authority_key, hashes.SHA256()).public_bytes(pem))
    (directory / "cert.pem").write_bytes(certificate.sign(authority_key, hashes.SHA256()).public_bytes(pem))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (directory / "key.pem").write_bytes(key.private_bytes(pem, *plain))


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
def test_a_joined_fleet_serves_under_tls_and_leaves_the_ray_as_it_was(ray_cluster, tmp_path, model_dir):
    address, holder = ray_cluster
    write_certificates(tmp_path)
    config = write_config(tmp_path, model_dir, transport={"tls_dir": "."})
    before = ours(holder)
    up = mobula("up", "-f", str(config), "--address", address, home=tmp_path)
    assert up.returncode == 0, up.stderr
    joined = LiveFleet(name="joined", url=up.stdout.strip(), home=tmp_path, model=model_dir)
    said = joined.client().completions.create(model="tiny", prompt=[5] * 40, max_tokens=8, extra_body={"ignore_eos": True})
    assert said.usage.completion_tokens == 8
    assert {row["role"] for row in joined.replicas()} == {"prefill", "decode"}

    assert mobula("down", "joined", home=tmp_path).returncode == 0
    assert holder.is_running()
    eventually(lambda: ours(holder) == before, "every actor of the fleet ends", END_S)
    assert os.listdir(tmp_path / "joined") == ["supervisor.log"]


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
