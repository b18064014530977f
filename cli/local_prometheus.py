"""A Prometheus server beside a local fleet: a child process on 127.0.0.1 that scrapes whom the controller names."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from cluster.errors import InvalidConfig, Unreachable

SCRAPE_S = 1  # The width of the controller's buckets.
REFRESH_S = 2  # A gateway or worker that comes is scraped so much later at most.
RETENTION = "2h"  # Prometheus' least block; the controller asks for six minutes.
RETENTION_BYTES = 512 * 2**20  # Of two hours at 1 s: enough for 20,000 series at 1.5 to 2 bytes a sample.
READY_S = 30.0
STOP_S = 10.0  # It writes down what it holds; then it is killed.
POLL_S = 0.05
PR_SET_PDEATHSIG = 1

# Between fork and exec of a process with threads nothing may run, so that another interpreter binds itself to us and becomes it.
_BOUND = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, signal.SIGKILL, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class LocalPrometheus:
    """Made by `start_prometheus`. Dies with the thread that started it, however that ends."""

    def __init__(self, process: asyncio.subprocess.Process, directory: Path, ca_file: Path | None) -> None:
        self._process, self._directory, self._ca_file = process, directory, ca_file
        self.url = ""
        """Once ready."""

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> None:
        """Until it answers. Raises Unreachable when it has ended or takes longer than READY_S."""
        try:
            async with asyncio.timeout(READY_S), aiohttp.ClientSession() as session:
                while not await self._is_ready(session):
                    if self._process.returncode is not None:
                        raise Unreachable(f"prometheus ended with {self._process.returncode}: {self._last_words()}")
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise Unreachable(f"prometheus is not ready after {READY_S:.0f} s: {self._last_words()}") from error

    def follow(self, discovery_url: str) -> None:
        """Scrape whom this URL names, and nobody else, from now on."""
        write_config(self._directory, discovery_url, self._ca_file)
        self._process.send_signal(signal.SIGHUP)

    async def stop(self) -> None:
        """In order, or by force after STOP_S. Harmless when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _is_ready(self, session: aiohttp.ClientSession) -> bool:
        self.url = self.url or _listening(self._process.pid)
        if not self.url:
            return False
        with contextlib.suppress(aiohttp.ClientError):
            async with session.get(f"{self.url}/-/ready") as response:
                return response.status == 200
        return False

    def _last_words(self) -> str:
        """Its last error; or how its report of a panic begins."""
        lines = (self._directory / "prometheus.log").read_text(errors="replace").splitlines()
        errors = [line for line in lines if "level=error" in line]
        return (errors[-1:] or lines[:1] or ["it said nothing"])[0][-300:]


async def start_prometheus(directory: Path, ca_file: Path | None = None) -> LocalPrometheus:
    """Ready, on a free port, and scraping nobody yet. Raises InvalidConfig without `prometheus` on the PATH, or Unreachable.

    directory: of its config, data and log; made where it is missing. ca_file: by which HTTPS targets are known.
    """
    binary = shutil.which("prometheus")
    if binary is None:
        raise InvalidConfig("telemetry.local_prometheus: no `prometheus` on the PATH (apt-get install prometheus)")
    arguments = [
        f"--config.file={write_config(directory, None, ca_file)}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--storage.tsdb.retention.time={RETENTION}",
        f"--storage.tsdb.retention.size={RETENTION_BYTES}B",
        "--web.listen-address=127.0.0.1:0",
        "--log.level=warn",
    ]
    with (directory / "prometheus.log").open("wb") as log:
        command = (sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), binary, *arguments)
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log)
    made = LocalPrometheus(process, directory, ca_file)
    try:
        await made.ready()
    except BaseException:
        await made.stop()
        raise
    return made


def write_config(directory: Path, discovery_url: str | None, ca_file: Path | None) -> Path:
    """Where it is. `discovery_url`: of HTTP service discovery; None scrapes nobody."""
    job: dict[str, Any] = {
        "job_name": "mobula",
        "http_sd_configs": [{"url": discovery_url, "refresh_interval": f"{REFRESH_S}s"}],
    }
    if ca_file is not None:
        job["tls_config"] = {"ca_file": str(ca_file)}
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": f"{SCRAPE_S}s"},
        "scrape_configs": [] if discovery_url is None else [job],
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "prometheus.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _listening(pid: int) -> str:
    """The URL of a process's only listener; empty while it has none."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.Process(pid).net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                return f"http://127.0.0.1:{connection.laddr.port}"
    return ""
