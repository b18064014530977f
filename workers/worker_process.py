"""A worker as the process it is: the Ray actor class.

It has no coroutines of its own, since Ray runs those actors on another thread than the one on which signals arrive. So the worker's
loop has a thread to itself, orders are handed to it, and SIGTERM drains.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, TypeVar

import ray
import uvloop

from cluster.fleet import ReplicaGroup, TransportSpec
from cluster.placement import ReplicaPlan, WorkerPlan
from workers.worker import Registry, Worker

Answer = TypeVar("Answer")


class WorkerProcess:
    """One per process, made on its main thread. Hosts what its plan names. Calls come one at a time."""

    def __init__(self, plan: WorkerPlan, transport: TransportSpec, secret: str, registry: Registry, epoch: int) -> None:
        self._loop = uvloop.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="worker", daemon=True).start()
        self._ending = False
        self._before: Any = signal.signal(signal.SIGTERM, self._on_sigterm)
        self._worker = Worker(plan, transport, secret, registry, host=_host(transport), ended=_end_process)
        self._wait(self._worker.serve())
        for replica in plan.replicas:
            self.host(replica, epoch)

    def host(self, plan: ReplicaPlan, epoch: int) -> None:
        self._order(lambda: self._worker.host(plan, epoch))

    def drain_replica(self, replica_id: str, within_s: float, epoch: int) -> None:
        self._order(lambda: self._worker.drain_replica(replica_id, within_s, epoch))

    def change_role(self, replica_id: str, group: ReplicaGroup, within_s: float, epoch: int) -> None:
        self._order(lambda: self._worker.change_role(replica_id, group, within_s, epoch))

    def slow(self, replica_id: str, factor: float) -> None:
        self._order(lambda: self._worker.slow(replica_id, factor))

    def _order(self, order: Callable[[], None]) -> None:
        async def obey() -> None:
            order()

        self._wait(obey())

    def _wait(self, call: Coroutine[Any, Any, Answer]) -> Answer:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """The first begins to drain; the one that `_end_process` sends goes to whoever was in charge before."""
        if self._worker.stopped:
            signal.signal(number, self._before or signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self._ending:
            self._ending = True
            asyncio.run_coroutine_threadsafe(_end(self._worker), self._loop)


def _host(transport: TransportSpec) -> str:
    """Where the worker listens: to other hosts only under TLS."""
    return ray.util.get_node_ip_address() if transport.tls_dir else "127.0.0.1"


async def _end(worker: Worker) -> None:
    """Outside the class: with one coroutine among its methods Ray would take it for an asynchronous actor."""
    await worker.drain()
    await worker.stop()


def _end_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
