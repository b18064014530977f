"""A Prometheus server of one's own: there when it is said to be, gone when its parent is."""

import os
import select
import subprocess
import sys
from pathlib import Path

import aiohttp
import psutil
import pytest
import yaml

from cli import local_prometheus
from cli.local_prometheus import start_prometheus, write_config
from cluster.errors import InvalidConfig, Unreachable

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "deploy/prometheus.yml"

installed = pytest.mark.skipif(
    not any(Path(folder, "prometheus").exists() for folder in os.get_exec_path()),
    reason="no `prometheus` on the PATH (apt-get install prometheus)",
)


def check(path: Path) -> None:
    done = subprocess.run(["promtool", "check", "config", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@installed
async def test_it_answers_on_loopback_alone_and_ends_when_told(tmp_path):
    server = await start_prometheus(tmp_path)
    try:
        listening = [one for one in psutil.Process(server.pid).net_connections("inet") if one.status == psutil.CONN_LISTEN]
        assert [f"http://{one.laddr.ip}:{one.laddr.port}" for one in listening] == [server.url]
        assert listening[0].laddr.ip == "127.0.0.1"
        async with aiohttp.ClientSession() as session, session.get(f"{server.url}/api/v1/query?query=vector(1)") as response:
            assert (await response.json())["status"] == "success"
    finally:
        await server.stop()
    assert not psutil.pid_exists(server.pid)
    await server.stop()


@installed
async def test_it_scrapes_whom_it_is_told_to_follow(tmp_path):
    """And no other: the URL that was followed before is forgotten."""
    server = await start_prometheus(tmp_path)
    try:
        for url in ("http://127.0.0.1:1/targets", "http://127.0.0.1:2/targets"):
            server.follow(url)
            (job,) = yaml.safe_load((tmp_path / "prometheus.yml").read_text())["scrape_configs"]
            assert [one["url"] for one in job["http_sd_configs"]] == [url]
        assert psutil.Process(server.pid).is_running()
    finally:
        await server.stop()


PARENT = """
import asyncio, sys
from pathlib import Path
from cli.local_prometheus import start_prometheus
async def main():
    print((await start_prometheus(Path(sys.argv[1]))).pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@installed
def test_it_dies_with_its_parent_however_that_ends(tmp_path):
    with subprocess.Popen([sys.executable, "-c", PARENT, tmp_path], stdout=subprocess.PIPE, cwd=ROOT) as parent:
        ended = os.pidfd_open(int(parent.stdout.readline()))
        assert not select.select([ended], [], [], 0)[0]
        parent.kill()
    assert select.select([ended], [], [], 30)[0]
    os.close(ended)


@installed
async def test_one_that_does_not_start_says_why(tmp_path):
    (tmp_path / "data").write_text("in the way")
    with pytest.raises(Unreachable, match=r"prometheus ended with \d+: .*data"):
        await start_prometheus(tmp_path)


HANGING = f"""#!{sys.executable}
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.pause()
"""


async def test_one_that_hangs_is_killed_and_told(tmp_path, monkeypatch):
    """It neither listens nor heeds SIGTERM."""
    fake = tmp_path / "bin/prometheus"
    fake.parent.mkdir()
    fake.write_text(HANGING)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent))
    monkeypatch.setattr(local_prometheus, "READY_S", 1.0)
    monkeypatch.setattr(local_prometheus, "STOP_S", 0.1)
    with pytest.raises(Unreachable, match=r"not ready after 1 s: it said nothing"):
        await start_prometheus(tmp_path / "there")
    assert not [child for child in psutil.Process().children() if str(fake) in child.cmdline()]


async def test_no_prometheus_on_the_path_is_told_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InvalidConfig, match=r"no `prometheus` on the PATH \(apt-get install prometheus\)"):
        await start_prometheus(tmp_path)


@installed
@pytest.mark.parametrize("url", [None, "http://127.0.0.1:9101/targets"])
def test_configs_are_what_prometheus_takes(tmp_path, url):
    check(EXAMPLE)
    authority = tmp_path / "ca.pem"
    authority.touch()
    for ca_file in (None, authority):
        check(write_config(tmp_path / "there", url, ca_file))
