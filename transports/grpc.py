"""Tokens, load and KV over gRPC: a bidirectional stream per gateway-worker pair, and a server stream per pull.

Methods are generic, with msgpack for their messages: no generated code. Each stream and each pull has its own connection,
so that one slow reader holds up nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import grpc
import grpc.aio
import numpy as np

from cluster.errors import InvalidConfig, InvalidRequest, MobulaError, ProtocolMismatch, Temporary, Unreachable
from transports import wire
from transports.channel import (
    ALIVE_S,
    SERVER_OPTIONS,
    SILENCE_S,
    admit,
    bind,
    check_answer,
    introduce,
    meaning,
    open_channel,
    refuse,
)
from transports.messages import FromWorker, KvChunk, KvDone, KvFailed, PullKv, ToWorker
from transports.outbox import STREAM_QUEUE_BYTES, KvQueue, StreamQueue, Throttle
from transports.transport import Credential, Listener, WorkerLink, WorkerService

SERVICE = "mobula.Worker"
SEGMENT = "mobula-segment"
MAX_CALLS = 4096  # Streams and pulls at once, of all callers together.
_ALIVE = wire.frame(wire.KvAlive())


class Segment(Protocol):
    """Memory that both ends of a pull can see."""

    name: str
    size: int

    def write(self, offset: int, parts: Sequence[memoryview]) -> bool: ...

    def read(self, offset: int, size: int) -> memoryview: ...

    def close(self) -> None: ...


class GrpcTransport:
    """`kv_bytes_per_s` throttles the KV that this end sends, to rehearse a slower network."""

    def __init__(self, credential: Credential, *, kv_bytes_per_s: float | None = None) -> None:
        if not credential.secret:
            raise InvalidConfig("the shared secret is empty")
        if kv_bytes_per_s is not None and not kv_bytes_per_s > 0:
            raise InvalidConfig(f"kv_bytes_per_s {kv_bytes_per_s} is not above 0")
        self._credential = credential
        self._kv_bytes_per_s = kv_bytes_per_s

    async def serve(self, service: WorkerService, host: str, port: int) -> Listener:
        servicer = _Servicer(service, self._credential, Throttle(self._kv_bytes_per_s), self._open_segment)
        handlers = {
            "Stream": grpc.stream_stream_rpc_method_handler(servicer.stream),
            "Pull": grpc.unary_stream_rpc_method_handler(servicer.pull),
        }
        server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        bound = bind(server, host, port, self._credential)
        await server.start()
        return _Listener(server, f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}")

    async def connect(self, endpoint: str, gateway_id: str) -> WorkerLink:
        channel = open_channel(endpoint, self._credential)
        call = channel.stream_stream(f"/{SERVICE}/Stream")(metadata=introduce(self._credential, gateway_id))
        try:
            async with asyncio.timeout(SILENCE_S):
                await check_answer(call, endpoint)
        except BaseException as error:
            await channel.close()
            raise _translated(error, endpoint) from error
        return _Link(channel, call, endpoint)

    async def pull(self, endpoint: str, pull: PullKv, write: Callable[[KvChunk, np.ndarray], None]) -> KvDone:
        return await self._pull(endpoint, pull, write, None)

    async def _pull(
        self,
        endpoint: str,
        pull: PullKv,
        write: Callable[[KvChunk, np.ndarray], None],
        segment: Segment | None,
    ) -> KvDone:
        metadata = introduce(self._credential)
        if segment is not None:
            metadata = (*metadata, (SEGMENT, segment.name))
        channel = open_channel(endpoint, self._credential)
        call = channel.unary_stream(f"/{SERVICE}/Pull")(wire.encode(pull), metadata=metadata)
        try:
            return await _receive(call, endpoint, pull, write, segment)
        except (TimeoutError, grpc.aio.AioRpcError) as error:
            raise _translated(error, endpoint) from error
        finally:
            call.cancel()
            await channel.close()

    def _open_segment(self, name: str, size: int) -> Segment | None:
        """Where a puller wants its KV; None sends it in the frames."""
        return None


class _Listener:
    def __init__(self, server: grpc.aio.Server, endpoint: str) -> None:
        self._server = server
        self.endpoint = endpoint

    async def close(self, grace_s: float) -> None:
        await self._server.stop(grace_s)


class _Outbox:
    def __init__(self) -> None:
        self._queue = StreamQueue()
        self.broken = asyncio.Event()

    def send(self, message: FromWorker) -> None:
        if not self.broken.is_set() and not self._queue.push(wire.encode(message)):
            self.broken.set()

    async def write_to(self, context: grpc.aio.ServicerContext) -> None:
        while True:
            await context.write(await self._queue.batch())


class _Servicer:
    """A worker's side of both methods."""

    def __init__(
        self,
        service: WorkerService,
        credential: Credential,
        throttle: Throttle,
        open_segment: Callable[[str, int], Segment | None],
    ) -> None:
        self._service = service
        self._credential = credential
        self._throttle = throttle
        self._open_segment = open_segment
        self._outboxes: dict[str, _Outbox] = {}

    async def stream(self, _: object, context: grpc.aio.ServicerContext) -> None:
        gateway_id = await admit(context, self._credential)
        outbox = self._opened(gateway_id)
        work = [
            asyncio.ensure_future(self._read(gateway_id, outbox, context)),
            asyncio.ensure_future(outbox.write_to(context)),
            asyncio.ensure_future(outbox.broken.wait()),
        ]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            overflown = outbox.broken.is_set()
        finally:
            self._closed(gateway_id, outbox)
            for task in work:
                task.cancel()
        failures = [task.exception() for task in done]
        for failure in failures:
            if isinstance(failure, ProtocolMismatch):
                await refuse(context, failure)
        if overflown:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"broken off: {STREAM_QUEUE_BYTES} bytes unread, or replaced")

    def _opened(self, gateway_id: str) -> _Outbox:
        """A gateway that comes again has lost its older stream, perhaps before we noticed."""
        older = self._outboxes.get(gateway_id)
        if older is not None:
            self._closed(gateway_id, older)
        outbox = self._outboxes[gateway_id] = _Outbox()
        self._service.opened(gateway_id, outbox)
        return outbox

    def _closed(self, gateway_id: str, outbox: _Outbox) -> None:
        outbox.broken.set()
        if self._outboxes.get(gateway_id) is outbox:
            del self._outboxes[gateway_id]
            self._service.closed(gateway_id)

    async def _read(self, gateway_id: str, outbox: _Outbox, context: grpc.aio.ServicerContext) -> None:
        while (data := await context.read()) is not grpc.aio.EOF:
            for message in wire.to_worker(data):
                if outbox.broken.is_set():
                    return
                self._service.received(gateway_id, message)

    async def pull(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        await admit(context, self._credential)
        try:
            pull = wire.pull_request(data)
            size = wire.kv_bytes(pull)
            name = dict(context.invocation_metadata()).get(SEGMENT)
            segment = None if name is None else self._open_segment(name, size)
        except ProtocolMismatch as error:
            await refuse(context, error)
        queue = KvQueue(size)
        try:
            self._start(pull, queue)
            await self._send(queue, _Placement(segment), context)
        except ProtocolMismatch as error:
            queue.cancel()
            await refuse(context, error)
        finally:
            queue.cancel()
            if segment is not None:
                segment.close()

    def _start(self, pull: PullKv, queue: KvQueue) -> None:
        try:
            self._service.pulled(pull, queue)
        except MobulaError as error:
            queue.end(KvFailed(message=str(error), retry=isinstance(error, Temporary)))

    async def _send(self, queue: KvQueue, placement: _Placement, context: grpc.aio.ServicerContext) -> None:
        while True:
            match await queue.take(ALIVE_S):
                case None:
                    await context.write(_ALIVE)
                case (chunk, kv):
                    for piece, payload in wire.pieces(chunk, kv):
                        await self._await_link(kv.nbytes * piece.chunk.tokens // chunk.tokens, context)
                        await context.write(placement.frame(piece, payload))
                case last:
                    await context.write(wire.frame(last))
                    return

    async def _await_link(self, size: int, context: grpc.aio.ServicerContext) -> None:
        wait_s = self._throttle.reserve_s(size)
        while wait_s > ALIVE_S:
            await asyncio.sleep(ALIVE_S)
            await context.write(_ALIVE)
            wait_s -= ALIVE_S
        if wait_s > 0:
            await asyncio.sleep(wait_s)


class _Placement:
    """Where a pull's bytes go: one after the other into the receiver's segment while there is room, else into the frames."""

    def __init__(self, segment: Segment | None) -> None:
        self._segment = segment
        self._used = 0

    def frame(self, piece: wire.KvBytes, payload: tuple[memoryview, ...]) -> bytes:
        size = sum(map(len, payload))
        offset, end = self._used, self._used + size
        if self._segment is None or end > self._segment.size or not self._segment.write(offset, payload):
            return wire.frame(piece, payload)
        self._used = end
        return wire.frame(wire.KvBytes(chunk=piece.chunk, checksum=piece.checksum, offset=offset))


class _Link:
    def __init__(self, channel: grpc.aio.Channel, call: grpc.aio.StreamStreamCall, endpoint: str) -> None:
        self._channel = channel
        self._call = call
        self._endpoint = endpoint
        self._queue = StreamQueue()
        self._closed = False
        self._writing = asyncio.ensure_future(self._write())

    def send(self, message: ToWorker) -> None:
        data = wire.encode(message)
        if len(data) + 8 > STREAM_QUEUE_BYTES:
            raise InvalidRequest(f"a message of {len(data)} bytes above {STREAM_QUEUE_BYTES}, the largest to {self._endpoint}")
        if not self._call.done() and not self._queue.push(data):
            self._call.cancel()
        if self._call.done():
            raise Unreachable(f"{self._endpoint}: the stream is broken, or {STREAM_QUEUE_BYTES} bytes are unread")

    async def messages(self) -> AsyncIterator[FromWorker]:
        while (data := await self._read()) is not None:
            for message in wire.from_worker(data):
                yield message

    async def close(self) -> None:
        self._closed = True
        self._writing.cancel()
        self._call.cancel()
        await self._channel.close()

    async def _read(self) -> bytes | None:
        try:
            data = await self._call.read()
        except grpc.aio.AioRpcError as error:
            if self._closed:
                return None
            raise meaning(error, self._endpoint) from error
        except asyncio.CancelledError:
            # gRPC says the same for a call that was cancelled and for a task that was.
            if asyncio.current_task().cancelling():
                raise
            if self._closed:
                return None
            raise Unreachable(f"{self._endpoint}: the stream was broken off at this end") from None
        if data is grpc.aio.EOF:
            if self._closed:
                return None
            raise Unreachable(f"{self._endpoint}: the worker ended the stream")
        return data

    async def _write(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # The reader says why.
            while True:
                await self._call.write(await self._queue.batch())


async def _receive(
    call: grpc.aio.UnaryStreamCall,
    endpoint: str,
    pull: PullKv,
    write: Callable[[KvChunk, np.ndarray], None],
    segment: Segment | None,
) -> KvDone:
    arrivals = wire.Arrivals(pull)
    async with asyncio.timeout(SILENCE_S):
        await check_answer(call, endpoint)
    while True:
        async with asyncio.timeout(SILENCE_S):
            data = await call.read()
        if data is grpc.aio.EOF:
            raise Unreachable(f"{endpoint}: the pull ended without its last word")
        header, payload = wire.unframe(data)
        match header:
            case wire.KvBytes():
                write(header.chunk, arrivals.array(header, _located(header, payload, pull, segment)))
            case KvDone():
                arrivals.check_complete()
                return header
            case KvFailed():
                raise Temporary(header.message) if header.retry else InvalidRequest(header.message)


def _located(piece: wire.KvBytes, payload: memoryview, pull: PullKv, segment: Segment | None) -> memoryview:
    if piece.offset is None:
        return payload
    size = piece.chunk.tokens * pull.layout.layer_token_bytes
    if segment is None or piece.offset < 0 or not 0 < size <= segment.size - piece.offset:
        raise ProtocolMismatch(f"KV of {size} bytes at {piece.offset} is outside the shared memory that was offered")
    return segment.read(piece.offset, size)


def _translated(error: BaseException, endpoint: str) -> BaseException:
    match error:
        case grpc.aio.AioRpcError():
            return meaning(error, endpoint)
        case TimeoutError():
            return Unreachable(f"{endpoint}: no sign of life for {SILENCE_S} s")
        case _:
            return error
