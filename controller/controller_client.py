"""The controller as others call it: found by its name, and again after each failure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from cluster.placement import CONTROLLER_NAME
from cluster.replica import Replica

Answer = TypeVar("Answer")


class ControllerClient:
    """Raises the controller's own errors, or Ray's where it is not there."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._handle: Any = None

    async def register(self, replicas: tuple[Replica, ...]) -> int:
        return await self._call(lambda handle: handle.register.remote(replicas))

    async def deregister(self, worker_id: str) -> None:
        await self._call(lambda handle: handle.deregister.remote(worker_id))

    async def failed(self, replica_id: str, error: str, *, permanent: bool) -> None:
        await self._call(lambda handle: handle.failed.remote(replica_id, error, permanent))

    async def call(self, method: str, *arguments: Any) -> Any:
        return await self._call(lambda handle: getattr(handle, method).remote(*arguments))

    async def _call(self, call: Callable[[Any], Awaitable[Answer]]) -> Answer:
        try:
            self._handle = self._handle or await asyncio.to_thread(ray.get_actor, CONTROLLER_NAME, self._namespace)
            return await call(self._handle)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else error) from None
        except BaseException:
            self._handle = None
            raise
