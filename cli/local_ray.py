"""A Ray cluster of this machine alone: one raylet for each named node, everything on 127.0.0.1, nothing left behind."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from cluster.fleet import NodeSpec

OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least is 75 MiB; nothing large goes through it.
SHUTDOWN_S = 15.0  # Ray's GCS may hang on its last events; it is ended by pid then.
TERMINATE_S = 3.0
PR_SET_CHILD_SUBREAPER = 36


def prepare_environment(directory: Path) -> None:
    """Before Ray is imported: it reads these once. `directory`: where all its files go."""
    (directory / "ray").mkdir()
    os.environ.update(
        RAY_TMPDIR=str(directory),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # Else Ray takes 127.0.0.1 for a mistake and looks for a reachable address.
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_DEDUP_LOGS="0",
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def adopt_orphans() -> None:
    """Have every process below us stay below us when its parent dies, so that none can be forgotten. Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class LocalRay:
    """Made by `start`; `stop` ends its every process."""

    def __init__(self, nodes: Sequence[NodeSpec], label: str) -> None:
        """Blocks until all nodes are there."""
        self.directory = Path(tempfile.mkdtemp(prefix="mobula-", dir="/tmp"))  # Sockets' paths must be short.
        prepare_environment(self.directory)
        self._cluster: Any = None
        try:
            self._start(nodes, label)
        except BaseException:
            self.stop()
            raise

    def _start(self, nodes: Sequence[NodeSpec], label: str) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        for index, node in enumerate(nodes):
            arguments = {
                "num_cpus": max(1, round(node.cpus)),
                "labels": {label: node.name},
                "object_store_memory": OBJECT_STORE_BYTES,
                "node_ip_address": "127.0.0.1",
            }
            if index == 0:
                # An exact port, so that two clusters that start at once do not both take the default.
                arguments |= {"include_dashboard": False, "gcs_server_port": 0}
            self._cluster.add_node(wait=index == 0, **arguments)
        self._cluster.wait_for_nodes()
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="warning")

    def stop(self) -> None:
        import ray

        ending = threading.Thread(target=self._shutdown, args=(ray,), daemon=True)
        ending.start()
        ending.join(SHUTDOWN_S)
        end_children()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _shutdown(self, ray: Any) -> None:
        ray.shutdown()
        if self._cluster is not None:
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


def _signal(send: Any) -> None:
    try:
        send()
    except psutil.NoSuchProcess:
        return
