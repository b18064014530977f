"""What a transport is: one stream per gateway-worker pair for tokens and load, and a pull for a prompt's KV.

A worker implements `WorkerService` and is served by `Transport.serve`; gateways and other workers reach it by `connect` and `pull`.
All of it runs on one asyncio loop a process, but `KvOutbox.put`, which an engine's thread calls.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

import msgspec
import numpy as np

from transports.messages import FromWorker, KvChunk, KvDone, KvFailed, PullKv, ToWorker


class Credential(msgspec.Struct, frozen=True, kw_only=True):
    """What both ends must hold. `secret` is compared in constant time; TLS, where given, is mutual."""

    secret: str
    tls_dir: str | None = None


class Outbox(Protocol):
    """A worker's end of one gateway's stream."""

    def send(self, message: FromWorker) -> None:
        """Queue a message without waiting; loop thread only.

        A slow reader bounds itself only: beyond a stated number of queued bytes the stream is broken off, and its gateway
        sees Unreachable. Sending on a broken stream does nothing.
        """


class KvOutbox(Protocol):
    """A prefill worker's end of one pull. `put` may be called from any thread and takes the array over."""

    def put(self, chunk: KvChunk, kv: np.ndarray) -> None: ...

    def end(self, last: KvDone | KvFailed) -> None:
        """Says the last word. Later calls do nothing."""

    def on_cancel(self, call: Callable[[], None]) -> None:
        """`call` runs once if the receiver goes away before `end`."""


class WorkerService(Protocol):
    """What a worker does with what arrives. All on the loop's thread; none may block."""

    def opened(self, gateway_id: str, outbox: Outbox) -> None: ...

    def received(self, gateway_id: str, message: ToWorker) -> None: ...

    def closed(self, gateway_id: str) -> None:
        """The stream is gone: abort what this gateway asked for."""

    def pulled(self, pull: PullKv, outbox: KvOutbox) -> None: ...


class Listener(Protocol):
    endpoint: str
    """host:port that `connect` and `pull` take."""

    async def close(self, grace_s: float) -> None: ...


class WorkerLink(Protocol):
    """A gateway's end of one stream."""

    def send(self, message: ToWorker) -> None:
        """Queue without waiting. Raises Unreachable once the stream is broken."""

    def messages(self) -> AsyncIterator[FromWorker]:
        """What the worker says, in order. Ends with Unreachable when the stream breaks, quietly after `close`."""

    async def close(self) -> None: ...


class Transport(Protocol):
    async def serve(self, service: WorkerService, host: str, port: int) -> Listener:
        """Port 0 takes a free one. Raises InvalidConfig where the address cannot be had."""

    async def connect(self, endpoint: str, gateway_id: str) -> WorkerLink:
        """Raises Unreachable, NotAllowed (secret) or ProtocolMismatch (version)."""

    async def pull(self, endpoint: str, pull: PullKv, write: Callable[[KvChunk, np.ndarray], None]) -> KvDone:
        """Fetch a prompt's KV, calling `write` for every chunk as it arrives; the array is valid during the call only.

        Raises Unreachable when nothing came for 5 s while the peer owes a sign of life, or the stream broke; Temporary or
        InvalidRequest as KvFailed says; ProtocolMismatch for a chunk that does not fit the layout or fails its checksum.
        """
