"""Faults made on purpose in a local fleet, from inside its supervisor, which has all its processes below it."""

from __future__ import annotations

import asyncio
import contextlib
import signal

import psutil

from cli.local_prometheus import LocalPrometheus
from cli.local_ray import LocalRay
from cluster.errors import InvalidRequest
from controller.status import FleetStatus

MAX_HANG_S = 600.0


class Faults:
    """local: None with a Ray that is not ours, in which nothing is broken on purpose."""

    def __init__(self, local: LocalRay | None, prometheus: LocalPrometheus | None = None) -> None:
        self._local, self._prometheus = local, prometheus
        self._hung: set[asyncio.Task[None]] = set()

    def kill(self, what: str, target: str, status: FleetStatus) -> str:
        """kill -9 of a worker, by its or a replica's id; of a node, by name; of the controller; of a gateway, by its address.

        An empty target takes the first there is. What was done, in words. Raises InvalidRequest.
        """
        local = self._here()
        match what:
            case "worker":
                replica_id, pid = _worker(status, target)
                return _signalled(pid, signal.SIGKILL, f"worker of {replica_id}")
            case "controller":
                return _signalled(status.controller_pid, signal.SIGKILL, "controller")
            case "gateway":
                return _signalled(_gateway(status, target), signal.SIGKILL, f"gateway {target}".strip())
            case "node":
                return local.kill_node(target or status.nodes[-1].name)
            case _:
                raise InvalidRequest(f"{what} is nothing that can be killed: worker, node, controller or gateway", param="what")

    def hang(self, target: str, seconds: float, status: FleetStatus) -> str:
        """SIGSTOP a worker; SIGCONT after so many seconds, never with 0."""
        self._here()
        if not 0.0 <= seconds <= MAX_HANG_S:
            raise InvalidRequest(f"seconds {seconds} outside [0, {MAX_HANG_S:.0f}]", param="seconds")
        replica_id, pid = _worker(status, target)
        said = _signalled(pid, signal.SIGSTOP, f"worker of {replica_id}")
        if seconds:
            task = asyncio.get_running_loop().create_task(_wake(pid, seconds))
            self._hung.add(task)
            task.add_done_callback(self._hung.discard)
        return said

    async def stop_prometheus(self) -> str:
        self._here()
        if self._prometheus is None:
            raise InvalidRequest("no Prometheus of this fleet runs; telemetry.local_prometheus starts one")
        await self._prometheus.stop()
        return f"Prometheus at {self._prometheus.url} is stopped"

    def _here(self) -> LocalRay:
        if self._local is None:
            raise InvalidRequest("chaos is for local fleets; this one runs in a Ray that is not its own")
        return self._local


def _worker(status: FleetStatus, target: str) -> tuple[str, int]:
    """A replica of it, and its process."""
    for replica in status.replicas:
        if replica.pid and (not target or target in (replica.replica_id, replica.worker_id)):
            return replica.replica_id, replica.pid
    known = ", ".join(replica.replica_id for replica in status.replicas if replica.pid)
    raise InvalidRequest(f"no worker hosts {target or 'anything'}; there are {known or 'none'}", param="target")


def _gateway(status: FleetStatus, target: str) -> int:
    """Whose process listens at the gateway's own address."""
    for url in status.gateways:
        address = url.partition("://")[2]
        if target in ("", url, address):
            port = int(address.rpartition(":")[2])
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if any(one.laddr and one.laddr.port == port and one.status == "LISTEN" for one in process.net_connections()):
                        return process.pid
    raise InvalidRequest(f"no gateway {target} runs; there are {', '.join(status.gateways) or 'none'}", param="target")


def _signalled(pid: int, number: signal.Signals, what: str) -> str:
    """Only a process below this one."""
    for process in psutil.Process().children(recursive=True):
        if process.pid == pid:
            process.send_signal(number)
            return f"{number.name} to {pid}, the {what}"
    raise InvalidRequest(f"process {pid}, the {what}, does not run any more")


async def _wake(pid: int, seconds: float) -> None:
    await asyncio.sleep(seconds)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).send_signal(signal.SIGCONT)
