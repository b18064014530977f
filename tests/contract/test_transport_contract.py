"""What every transport promises, run on each of them."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import os
import signal
import socket
import sys
import threading

import grpc.aio
import msgspec
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transports.channel
import transports.grpc
from cluster.errors import InvalidConfig, InvalidRequest, NotAllowed, Overloaded, ProtocolMismatch, Temporary, Unreachable
from cluster.handoff import RequestState, Token
from cluster.kv import KvLayout
from cluster.request import Request, SamplingParams
from transports import wire
from transports.grpc import GrpcTransport
from transports.messages import KV_FRAME_BYTES, Abort, BlockEvents, KvChunk, KvDone, KvFailed, PullKv, Submit, Tokens
from transports.shared_memory import SHM_DIR, SharedMemoryTransport
from transports.transport import Credential

CREDENTIAL = Credential(secret="sesame")
LAYOUT = KvLayout(layers=3, kv_heads=2, head_dim=8)
PROMPT = 40
KINDS = (GrpcTransport, SharedMemoryTransport)


class Worker:
    """A WorkerService that remembers, and whose pulls a test scripts with `on_pull`."""

    def __init__(self, on_pull=None):
        self.outboxes = {}
        self.said = asyncio.Queue()
        self.on_pull = on_pull

    def opened(self, gateway_id, outbox):
        self.outboxes[gateway_id] = outbox
        self.said.put_nowait(("opened", gateway_id))

    def received(self, gateway_id, message):
        self.said.put_nowait((gateway_id, message))

    def closed(self, gateway_id):
        self.said.put_nowait(("closed", gateway_id))

    def pulled(self, pull, outbox):
        self.on_pull(pull, outbox)


def request(prompt=PROMPT):
    return Request(request_id="r", model="m", prompt=tuple(range(prompt)), sampling=SamplingParams(max_tokens=4))


def pull_of(layout=LAYOUT, skip=0, prompt=PROMPT):
    return PullKv(replica_id="p0", request=request(prompt), attempt=0, skip_tokens=skip, layout=layout)


def kv_of(layout, layer, first, tokens):
    shape = (2, tokens, layout.kv_heads, layout.head_dim)
    return np.random.default_rng([layer, first]).standard_normal(shape, dtype=np.float32)


def done_of(pull):
    return KvDone(state=RequestState(request=pull.request, generated=(7,)), queue_s=0.0, prefill_s=0.1, cached_tokens=0)


def put_layer(pull, outbox, layer):
    first, tokens = pull.skip_tokens, wire.prompt_tokens(pull) - pull.skip_tokens
    outbox.put(KvChunk(layer=layer, first_token=first, tokens=tokens), kv_of(pull.layout, layer, first, tokens))


def prefill(pull, outbox):
    for layer in range(pull.layout.layers):
        put_layer(pull, outbox, layer)
    outbox.end(done_of(pull))


def tokens(index, text=""):
    return Tokens(replica_id="d0", tokens=(Token(request_id="r", attempt=0, index=index, token_id=index, text=text),))


@pytest.fixture(params=KINDS)
def transport(request):
    return request.param(CREDENTIAL)


@pytest.fixture(autouse=True)
def no_segment_stays():
    mine = f"mobula-{os.getpid()}-*"
    yield
    assert not list(SHM_DIR.glob(mine))


@contextlib.asynccontextmanager
async def serving(transport, worker):
    listener = await transport.serve(worker, "127.0.0.1", 0)
    try:
        yield listener.endpoint
    finally:
        await listener.close(0)


@contextlib.asynccontextmanager
async def connected(transport, worker, gateway_id="g0"):
    async with serving(transport, worker) as endpoint:
        link = await transport.connect(endpoint, gateway_id)
        assert await worker.said.get() == ("opened", gateway_id)
        try:
            yield link
        finally:
            await link.close()


async def test_messages_arrive_both_ways_in_order(transport):
    worker = Worker()
    async with connected(transport, worker) as link:
        asked = [Submit(replica_id="d0", request=request(), attempt=n) for n in range(100)]
        for message in asked:
            link.send(message)
        assert [await worker.said.get() for _ in asked] == [("g0", message) for message in asked]
        told = [tokens(n) for n in range(1000)]
        for message in told:
            worker.outboxes["g0"].send(message)
        heard = link.messages()
        assert [await anext(heard) for _ in told] == told


async def test_a_pull_brings_every_layer_bit_for_bit(transport):
    layout = KvLayout(layers=2, kv_heads=8, head_dim=64)
    pull = pull_of(layout, skip=16, prompt=700)
    received = {layer: np.zeros((2, 700, 8, 64), dtype=np.float32) for layer in range(2)}
    sizes = []

    def write(chunk, kv):
        received[chunk.layer][:, chunk.first_token : chunk.first_token + chunk.tokens] = kv
        sizes.append(kv.nbytes)

    async with serving(transport, Worker(prefill)) as endpoint:
        assert await transport.pull(endpoint, pull, write) == done_of(pull)
    assert max(sizes) <= KV_FRAME_BYTES < 684 * layout.layer_token_bytes
    for layer in range(2):
        np.testing.assert_array_equal(received[layer][:, 16:], kv_of(layout, layer, 16, 684))
