"""A whole emulated fleet on a real local Ray: up, serving, a worker killed, down. One start, shared by all claims, in order."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest
from rich.console import Console

from cli.down import end_fleet
from cli.fleet_home import FleetHome
from cli.status import fetch, replica_table
from cli.up import start
from cluster.errors import InvalidConfig
from cluster.request import Request, SamplingParams
from controller.status import FleetStatus
from transports.grpc import GrpcTransport
from transports.messages import PrefillSource, Submit, Tokens
from transports.transport import Credential
from workers.worker import host_id

GONE_S = 20.0
QUIET = Console(quiet=True)

FLEET = """
name: live
models: [{name: tiny, path: MODEL}]
nodes: [{name: a}, {name: b}]
replicas:
  - {role: prefill, engine: emulated, pace: {shape: llama-3.1-8b, accelerator: h100}}
  - {role: decode, count: 2, engine: emulated, pace: {shape: llama-3.1-8b, accelerator: h100}}
gateway: {port: PORT, allow_anonymous: true, replicas: 2}
"""


@pytest.fixture(scope="module")
def config(model_dir: Path):
    """A cluster.yaml on a free port, with a home of its own."""
    directory = Path(tempfile.mkdtemp(prefix="mobula-test-", dir="/tmp"))
    os.environ["MOBULA_HOME"] = str(directory)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (directory / "cluster.yaml").write_text(FLEET.replace("PORT", str(probe.getsockname()[1])).replace("MODEL", str(model_dir)))
    yield directory / "cluster.yaml"
    del os.environ["MOBULA_HOME"]
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def home(config):
    process, url, home = start(config, None, QUIET)
    assert url == home.record().url
    yield home
    if (record := home.record()) is not None:
        end_fleet(record, home)
    process.wait(GONE_S)


def request(request_id: str) -> Request:
    return Request(request_id=request_id, model="tiny", prompt=tuple(range(100)), sampling=SamplingParams(max_tokens=8))


async def generate(home: FleetHome, now: FleetStatus, decode: str, request_id: str, prefill: str | None = None) -> list[int]:
    """Tokens of one request, asked of a decode worker as a gateway would."""
    replicas = {replica.replica_id: replica for replica in now.replicas}
    source = prefill and PrefillSource(replica_id=prefill, endpoint=replicas[prefill].endpoint, host_id=host_id())
    transport = GrpcTransport(Credential(secret=home.secret_path.read_text()))
    link = await transport.connect(replicas[decode].endpoint, "gateway-0")
    link.send(Submit(replica_id=decode, request=request(request_id), attempt=0, prefill=source or None))
    tokens = []
    async with asyncio.timeout(20):
        async for message in link.messages():
            if isinstance(message, Tokens):
                tokens += message.tokens
                if tokens[-1].finish:
                    break
    await link.close()
    assert tokens[-1].finish == "length", tokens[-1]
    return [token.token_id for token in tokens]


def until(home: FleetHome, holds) -> FleetStatus:
    deadline_s = time.monotonic() + GONE_S
    while not holds(now := fetch(home)):
        assert time.monotonic() < deadline_s, now
        time.sleep(0.2)
    return now


def test_every_replica_is_ready_on_the_node_it_was_given(home):
    now = fetch(home)
    assert {(r.replica_id, r.node, r.phase) for r in now.replicas} == {
        ("decode-default-0", "a", "ready"),
        ("decode-default-1", "b", "ready"),
        ("prefill-default-2", "a", "ready"),
    }
    assert replica_table(now).row_count == 3


def test_all_that_is_ours_listens_on_loopback_only(home):
    supervisor = home.record().supervisor.find()
    for process in (supervisor, *supervisor.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            listening = [c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            assert {ip for ip in listening if ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")} == set(), process.cmdline()


def requests_seen(metrics: str) -> float:
    return sum(float(value) for value in re.findall(r"^mobula_requests_total\{[^}]*\} (\S+)$", metrics, re.MULTILINE))


def test_each_gateway_replica_counts_for_itself_at_its_own_address(home):
    now = until(home, lambda now: len(now.gateways) == 2)
    for _ in range(12):  # A connection each: the kernel gives them to either.
        answer = httpx.post(f"{now.url}/v1/completions", json={"model": "tiny", "prompt": "one", "max_tokens": 2})
        assert answer.status_code == 200, answer.text
    seen = [requests_seen(httpx.get(f"{url}/metrics").text) for url in now.gateways]
    assert sum(seen) == 12
    assert len(set(now.gateways)) == 2


def test_the_secret_is_its_owners_alone(home):
    assert home.secret_path.stat().st_mode & 0o777 == 0o600


def test_a_fleet_that_is_up_is_not_started_twice(home, config, model_dir):
    twin = config.with_name("twin.yaml")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        twin.write_text(FLEET.replace("PORT", str(probe.getsockname()[1])).replace("MODEL", str(model_dir)))
    with pytest.raises(InvalidConfig, match="fleet live is up as process"):
        start(twin, None, QUIET)


async def test_disaggregated_output_equals_that_of_one_replica(home):
    now = fetch(home)
    alone = await generate(home, now, "decode-default-0", "alone")
    assert len(alone) == 8
    assert await generate(home, now, "decode-default-1", "apart", prefill="prefill-default-2") == alone


async def test_the_rest_serves_on_when_a_prefill_worker_is_killed(home):
    now = fetch(home)
    victim = next(replica for replica in now.replicas if replica.role == "prefill")
    alone = await generate(home, now, "decode-default-0", "before")
    os.kill(victim.pid, signal.SIGKILL)
    assert await generate(home, now, "decode-default-1", "after", prefill=victim.replica_id) == alone
    until(home, lambda now: {r.replica_id: r.phase for r in now.replicas}[victim.replica_id] == "lost")
    until(home, lambda now: [r.role for r in now.replicas if r.phase == "ready"].count("prefill") == 1)


def test_a_worker_ends_on_sigterm_and_leaves_the_table(home):
    victim = next(replica for replica in fetch(home).replicas if replica.replica_id == "decode-default-1")
    process = psutil.Process(victim.pid)
    os.kill(victim.pid, signal.SIGTERM)
    process.wait(GONE_S)
    until(home, lambda now: "decode-default-1" not in {r.replica_id for r in now.replicas})


def test_down_leaves_no_process_and_no_file(home):
    record = home.record()
    supervisor = record.supervisor.find()
    below = supervisor.children(recursive=True)
    assert len(below) > 3
    directory = Path(below[0].environ()["RAY_TMPDIR"])
    assert directory.is_dir()
    assert end_fleet(record, home) == 0
    psutil.wait_procs(below, GONE_S)
    assert [process for process in below if process.is_running()] == []
    assert not directory.exists()
    assert sorted(path.name for path in home.path.iterdir()) == [
        "epoch",
        "fleet.json",
        "http_port",
        "journal.sqlite",
        "logs",
        "supervisor.log",
    ]
    assert list(home.ray_logs_path.glob("worker-*.err"))
