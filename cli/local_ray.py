"""A Ray cluster of this machine alone: everything on 127.0.0.1, nothing left behind.

One raylet for each named node, and one for Ray's head, the controller and the gateway, so that any node may die.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from cli.joined_ray import ENVIRONMENT
from cluster.errors import InvalidRequest
from cluster.fleet import NodeSpec

OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least is 75 MiB; nothing large goes through it.
SHUTDOWN_S = 15.0  # Ray's GCS may hang on its last events; it is ended by pid then.
TERMINATE_S = 3.0
LOG_BYTES = 16 * 2**20  # Of one process's log; with one older part kept.
PR_SET_CHILD_SUBREAPER = 36


def prepare_environment(directory: Path) -> None:
    """Before Ray is imported: it reads these once. `directory`: where all its files go, logs among them."""
    (directory / "ray").mkdir()
    os.environ.update(
        RAY_TMPDIR=str(directory),
        **ENVIRONMENT,
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_DEDUP_LOGS="0",
        RAY_ROTATION_MAX_BYTES=str(LOG_BYTES),
        RAY_ROTATION_BACKUP_COUNT="1",
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def adopt_orphans() -> None:
    """Have every process below us stay below us when its parent dies, so that none can be forgotten. Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class LocalRay:
    """Made by `start`; `stop` ends its every process."""

    def __init__(self, nodes: Sequence[NodeSpec], label: str, directory: Path) -> None:
        """Blocks until all nodes are there. `directory`: an empty one of a short path, since sockets go there too."""
        prepare_environment(directory)
        self._cluster: Any = None
        self._nodes: dict[str, Any] = {}
        try:
            self._start(nodes, label)
        except BaseException:
            self.stop()
            raise

    def _start(self, nodes: Sequence[NodeSpec], label: str) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        common = {"object_store_memory": OBJECT_STORE_BYTES, "node_ip_address": "127.0.0.1"}
        # An exact port, so that two clusters that start at once do not both take the default.
        self._cluster.add_node(num_cpus=0, include_dashboard=False, gcs_server_port=0, **common)
        for node in nodes:
            labels = {label: node.name}
            self._nodes[node.name] = self._cluster.add_node(wait=False, num_cpus=max(1, round(node.cpus)), labels=labels, **common)
        self._cluster.wait_for_nodes()
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="warning")

    def kill_node(self, name: str) -> str:
        """kill -9 of its raylet and of all that runs there. Raises InvalidRequest for one that does not run."""
        node = self._nodes.pop(name, None)
        if node is None:
            raise InvalidRequest(f"no node {name} runs; there are {', '.join(self._nodes) or 'none'}", param="target")
        raylets = [psutil.Process(info.process.pid) for infos in node.all_processes.values() for info in infos]
        killed = [child for raylet in raylets for child in (raylet, *raylet.children(recursive=True))]
        for process in killed:
            _signal(process.kill)
        return f"SIGKILL to {len(killed)} processes, those of node {name}"

    def stop(self) -> None:
        if self._cluster is not None:
            ending = threading.Thread(target=self._shutdown, daemon=True)
            ending.start()
            ending.join(SHUTDOWN_S)
        end_children()

    def _shutdown(self) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()


def end_children() -> None:
    """End every process below this one."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        _signal(child.terminate)
    _, alive = psutil.wait_procs(children, TERMINATE_S)
    for child in alive:
        _signal(child.kill)
    psutil.wait_procs(alive, TERMINATE_S)


def processes_in(directory: Path) -> list[psutil.Process]:
    """Those of a local Ray, orphans too: each keeps its log open there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(Path(file.path).is_relative_to(directory) for file in process.open_files()):
                found.append(process)
    return found


def show_logs(directory: Path, logs: Path) -> None:
    """Have `logs` name the logs of a local Ray while it runs, instead of those of the one before it."""
    _remove(logs)
    logs.symlink_to(directory / "ray/session_latest/logs")


def put_away(directory: Path, logs: Path) -> None:
    """Remove a local Ray's files, but keep its logs in `logs`."""
    for session in directory.glob("ray/session_[0-9]*/logs"):
        _remove(logs)
        shutil.move(session, logs)
    shutil.rmtree(directory, ignore_errors=True)


def _remove(logs: Path) -> None:
    if logs.is_symlink():
        logs.unlink()
    else:
        shutil.rmtree(logs, ignore_errors=True)


def _signal(send: Any) -> None:
    try:
        send()
    except psutil.NoSuchProcess:
        return
