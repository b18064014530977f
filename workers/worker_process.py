"""A worker as the process it is: the Ray actor class.

It has no coroutines of its own, since Ray runs those actors on another thread than the one on which signals arrive. So the worker's
loop has a thread to itself, calls wait for it here, and SIGTERM drains.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine
from types import FrameType
from typing import Any, TypeVar

import ray
import uvloop

from cluster.fleet import TransportSpec
from cluster.placement import WorkerPlan
from workers.worker import Registry, Worker, WorkerStatus

Answer = TypeVar("Answer")


class WorkerProcess:
    """One per process, made on its main thread. Calls come one at a time."""

    def __init__(self, plan: WorkerPlan, transport: TransportSpec, secret: str, registry: Registry) -> None:
        self._loop = uvloop.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="worker", daemon=True).start()
        self._worker = Worker(plan, transport, secret, registry, host=_host(transport))
        self._ending = False
        self._before: Any = signal.signal(signal.SIGTERM, self._on_sigterm)

    def start(self) -> None:
        """Until ready."""
        self._wait(self._worker.start())

    def drain(self, deadline_s: float) -> None:
        self._wait(self._worker.drain(deadline_s))

    def stop(self) -> None:
        self._wait(self._worker.stop())

    def status(self) -> WorkerStatus:
        return self._wait(self._worker.status())

    def _wait(self, call: Coroutine[Any, Any, Answer]) -> Answer:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        """The first begins to drain; the one that `_end` sends itself goes to whoever was in charge before."""
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
    os.kill(os.getpid(), signal.SIGTERM)
