"""What every transport promises, run on each of them."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
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
import transports.shared_memory
from cluster.errors import InvalidConfig, InvalidRequest, NotAllowed, Overloaded, ProtocolMismatch, Temporary, Unreachable
from cluster.handoff import RequestState, Token
from cluster.kv import KvLayout
from cluster.request import Request, SamplingParams
from transports import wire
from transports.grpc import GrpcTransport
from transports.messages import KV_FRAME_BYTES, Abort, KvChunk, KvDone, KvFailed, PullKv, Submit, Tokens
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
    yield
    gc.collect()
    spare = transports.shared_memory.SPARE_SEGMENTS
    assert len(list(SHM_DIR.glob(f"mobula-{os.getpid()}-*"))) <= spare


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


async def test_layer_0_arrives_before_the_last_layer_is_sent(transport):
    outboxes, arrived = asyncio.Queue(), asyncio.Event()
    layers = []

    def write(chunk, kv):
        layers.append(chunk.layer)
        arrived.set()

    async with serving(transport, Worker(lambda pull, outbox: outboxes.put_nowait(outbox))) as endpoint:
        pulling = asyncio.ensure_future(transport.pull(endpoint, pull_of(), write))
        outbox = await outboxes.get()
        put_layer(pull_of(), outbox, 0)
        await arrived.wait()
        assert layers == [0]
        put_layer(pull_of(), outbox, 1)
        put_layer(pull_of(), outbox, 2)
        outbox.end(done_of(pull_of()))
        await pulling
    assert layers == [0, 1, 2]


async def test_kv_may_be_put_from_any_thread(transport):
    threads = []

    def on_pull(pull, outbox):
        threads.append(threading.Thread(target=prefill, args=(pull, outbox)))
        threads[0].start()

    async with serving(transport, Worker(on_pull)) as endpoint:
        assert await transport.pull(endpoint, pull_of(), lambda chunk, kv: None) == done_of(pull_of())
    threads[0].join()


async def test_a_wrong_secret_is_not_allowed(transport):
    stranger = type(transport)(Credential(secret="guess"))
    async with serving(transport, Worker(prefill)) as endpoint:
        with pytest.raises(NotAllowed, match="secret"):
            await stranger.connect(endpoint, "g0")
        with pytest.raises(NotAllowed, match="secret"):
            await stranger.pull(endpoint, pull_of(), lambda chunk, kv: None)


async def test_a_server_refuses_another_version_naming_both(transport, monkeypatch):
    introduce = transports.channel.introduce

    def of_the_future(credential, gateway_id=""):
        return (("mobula-version", "99"), *introduce(credential, gateway_id)[1:])

    monkeypatch.setattr(transports.grpc, "introduce", of_the_future)
    async with serving(transport, Worker(prefill)) as endpoint:
        with pytest.raises(ProtocolMismatch, match=r"99.*1"):
            await transport.connect(endpoint, "g0")
        with pytest.raises(ProtocolMismatch, match=r"99.*1"):
            await transport.pull(endpoint, pull_of(), lambda chunk, kv: None)


async def test_a_client_refuses_another_version_naming_both(transport, monkeypatch):
    async def admit(context, credential):
        await context.send_initial_metadata((("mobula-version", "99"),))
        return "g0"

    monkeypatch.setattr(transports.grpc, "admit", admit)
    async with serving(transport, Worker(prefill)) as endpoint:
        with pytest.raises(ProtocolMismatch, match=r"99.*1"):
            await transport.connect(endpoint, "g0")
        with pytest.raises(ProtocolMismatch, match=r"99.*1"):
            await transport.pull(endpoint, pull_of(), lambda chunk, kv: None)


async def test_tls_is_mutual(transport, tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    issue(ours)
    issue(theirs)
    kind = type(transport)
    trusted, stranger = (kind(Credential(secret="sesame", tls_dir=str(path))) for path in (ours, theirs))
    async with serving(trusted, Worker(prefill)) as endpoint:
        link = await trusted.connect(endpoint, "g0")
        await link.close()
        assert await trusted.pull(endpoint, pull_of(), lambda chunk, kv: None) == done_of(pull_of())
        with pytest.raises(Unreachable):
            await stranger.connect(endpoint, "g0")
        with pytest.raises(Unreachable):
            await transport.connect(endpoint, "g0")


async def test_plain_text_stays_on_this_machine(transport, tmp_path):
    with pytest.raises(InvalidConfig, match=r"0\.0\.0\.0"):
        await transport.serve(Worker(), "0.0.0.0", 0)
    with pytest.raises(InvalidConfig, match=r"10\.0\.0\.1"):
        await transport.connect("10.0.0.1:1", "g0")
    with pytest.raises(InvalidConfig, match=r"ca\.pem"):
        await type(transport)(Credential(secret="sesame", tls_dir=str(tmp_path))).serve(Worker(), "127.0.0.1", 0)


async def test_a_port_that_is_taken_is_an_invalid_config(transport):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InvalidConfig, match=str(taken.getsockname()[1])):
            await transport.serve(Worker(), "127.0.0.1", taken.getsockname()[1])


async def test_nobody_there_is_unreachable(transport):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(Unreachable):
        await transport.connect(endpoint, "g0")
    with pytest.raises(Unreachable):
        await transport.pull(endpoint, pull_of(), lambda chunk, kv: None)


async def test_an_oversized_message_is_refused_and_the_stream_goes_on(transport):
    worker = Worker()
    async with connected(transport, worker) as link:
        with pytest.raises(InvalidRequest, match="33554432"):
            link.send(Submit(replica_id="x" * 2**25, request=request(), attempt=0))
        link.send(Abort(request_id="r", attempt=0))
        assert await worker.said.get() == ("g0", Abort(request_id="r", attempt=0))


async def test_a_server_reads_no_oversized_message(transport):
    async with serving(transport, Worker(prefill)) as endpoint, grpc.aio.insecure_channel(endpoint) as channel:
        streaming = channel.stream_stream("/mobula.Worker/Stream")(metadata=transports.channel.introduce(CREDENTIAL, "g0"))
        await streaming.write(bytes(2**25 + 1))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await streaming.read()
        assert refused.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
        assert await transport.pull(endpoint, pull_of(), lambda chunk, kv: None) == done_of(pull_of())


async def test_a_slow_reader_bounds_only_itself(transport):
    worker = Worker()
    async with serving(transport, worker) as endpoint:
        slow, quick = [await transport.connect(endpoint, name) for name in ("slow", "quick")]
        assert {(await worker.said.get())[1] for _ in "12"} == {"slow", "quick"}
        text = "x" * 2**20
        heard = quick.messages()
        for n in range(64):
            worker.outboxes["slow"].send(tokens(n, text))
            worker.outboxes["quick"].send(tokens(n, text))
            assert await anext(heard) == tokens(n, text)
        assert await worker.said.get() == ("closed", "slow")
        worker.outboxes["slow"].send(tokens(64))
        with pytest.raises(Unreachable, match="unread"):
            async for _ in slow.messages():
                pass
        worker.outboxes["quick"].send(tokens(64))
        assert await anext(heard) == tokens(64)
        await slow.close()
        await quick.close()


async def test_a_gateway_that_leaves_is_closed_and_hears_no_error(transport):
    worker = Worker()
    async with connected(transport, worker) as link:
        heard = asyncio.ensure_future(anext(link.messages(), "quiet"))
        await asyncio.sleep(0)
        await link.close()
        assert await heard == "quiet"
        assert await worker.said.get() == ("closed", "g0")
        with pytest.raises(Unreachable):
            link.send(Abort(request_id="r", attempt=0))


async def test_a_gateway_that_comes_again_replaces_its_older_stream(transport):
    worker = Worker()
    async with serving(transport, worker) as endpoint:
        older = await transport.connect(endpoint, "g0")
        newer = await transport.connect(endpoint, "g0")
        assert [await worker.said.get() for _ in "123"] == [("opened", "g0"), ("closed", "g0"), ("opened", "g0")]
        with pytest.raises(Unreachable):
            await anext(older.messages())
        worker.outboxes["g0"].send(tokens(0))
        assert await anext(newer.messages()) == tokens(0)
        await older.close()
        await newer.close()


async def test_a_cancelled_pull_reaches_the_prefill(transport):
    started, cancelled = asyncio.Event(), asyncio.Event()
    outboxes = []

    def on_pull(pull, outbox):
        outbox.on_cancel(cancelled.set)
        outboxes.append(outbox)
        started.set()

    async with serving(transport, Worker(on_pull)) as endpoint:
        pulling = asyncio.ensure_future(transport.pull(endpoint, pull_of(), lambda chunk, kv: None))
        await started.wait()
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
        await cancelled.wait()
        late = asyncio.Event()
        outboxes[0].on_cancel(late.set)
        assert late.is_set()


async def test_an_error_of_the_receiver_cancels_the_prefill(transport):
    cancelled = asyncio.Event()

    def on_pull(pull, outbox):
        outbox.on_cancel(cancelled.set)
        put_layer(pull, outbox, 0)

    def write(chunk, kv):
        raise ProtocolMismatch("no such block")

    async with serving(transport, Worker(on_pull)) as endpoint:
        with pytest.raises(ProtocolMismatch, match="no such block"):
            await transport.pull(endpoint, pull_of(), write)
        await cancelled.wait()


@pytest.mark.parametrize(("retry", "error"), [(True, Temporary), (False, InvalidRequest)])
async def test_a_failed_prefill_says_whether_to_try_again(transport, retry, error):
    def on_pull(pull, outbox):
        outbox.end(KvFailed(message="pool is full", retry=retry))
        outbox.end(done_of(pull))

    async with serving(transport, Worker(on_pull)) as endpoint:
        with pytest.raises(error, match="pool is full"):
            await transport.pull(endpoint, pull_of(), lambda chunk, kv: None)


async def test_a_worker_that_refuses_a_pull_fails_it(transport):
    def on_pull(pull, outbox):
        raise Overloaded("9 prefills waiting")

    async with serving(transport, Worker(on_pull)) as endpoint:
        with pytest.raises(Temporary, match="9 prefills"):
            await transport.pull(endpoint, pull_of(), lambda chunk, kv: None)


async def test_a_flipped_bit_is_noticed(transport, monkeypatch):
    pieces = wire.pieces

    def corrupted(chunk, kv):
        for piece, payload in pieces(chunk, kv):
            yield msgspec.structs.replace(piece, checksum=piece.checksum ^ 1), payload

    monkeypatch.setattr(wire, "pieces", corrupted)
    async with serving(transport, Worker(prefill)) as endpoint:
        with pytest.raises(ProtocolMismatch, match="checksum of layer 0"):
            await transport.pull(endpoint, pull_of(), lambda chunk, kv: pytest.fail("corrupt KV was written"))


def put_flat(pull, outbox):
    outbox.put(KvChunk(layer=0, first_token=0, tokens=4), np.zeros((2, 4, 16), dtype=np.float32))


def put_other_heads(pull, outbox):
    outbox.put(KvChunk(layer=0, first_token=0, tokens=4), np.zeros((2, 4, 3, 8), dtype=np.float32))


def put_beyond_layers(pull, outbox):
    put_layer(pull, outbox, LAYOUT.layers)


def put_beyond_tokens(pull, outbox):
    outbox.put(KvChunk(layer=0, first_token=PROMPT, tokens=4), kv_of(LAYOUT, 0, 0, 4))


def put_too_little(pull, outbox):
    put_layer(pull, outbox, 0)
    outbox.end(done_of(pull))


@pytest.mark.parametrize("on_pull", [put_flat, put_other_heads, put_beyond_layers, put_beyond_tokens, put_too_little])
async def test_kv_of_a_wrong_layout_is_refused(transport, on_pull):
    async with serving(transport, Worker(on_pull)) as endpoint:
        with pytest.raises(ProtocolMismatch):
            await transport.pull(endpoint, pull_of(), lambda chunk, kv: None)


async def test_an_engine_that_puts_more_than_was_asked_for_fails_the_pull(transport):
    def on_pull(pull, outbox):
        for layer in (0, 0, 1, 2):
            put_layer(pull, outbox, layer)

    async with serving(transport, Worker(on_pull)) as endpoint:
        with pytest.raises(Temporary, match=str(PROMPT * LAYOUT.token_bytes)):
            await transport.pull(endpoint, pull_of(), lambda chunk, kv: None)


async def test_layers_sent_again_are_written_again(transport):
    """A preempted prefill starts over; its KV is the same."""
    outboxes, arrived, layers = asyncio.Queue(), asyncio.Event(), []

    def write(chunk, kv):
        np.testing.assert_array_equal(kv, kv_of(LAYOUT, chunk.layer, 0, PROMPT))
        layers.append(chunk.layer)
        arrived.set()

    async with serving(transport, Worker(lambda pull, outbox: outboxes.put_nowait(outbox))) as endpoint:
        pulling = asyncio.ensure_future(transport.pull(endpoint, pull_of(), write))
        outbox = await outboxes.get()
        put_layer(pull_of(), outbox, 0)
        await arrived.wait()
        prefill(pull_of(), outbox)
        await pulling
    assert layers == [0, 0, 1, 2]


async def test_a_long_prefill_stays_alive_while_nothing_is_sent(transport, monkeypatch):
    monkeypatch.setattr(transports.grpc, "ALIVE_S", 0.02)
    monkeypatch.setattr(transports.grpc, "SILENCE_S", 0.5)
    tasks = []

    async def compute(pull, outbox):
        await asyncio.sleep(1.0)
        prefill(pull, outbox)

    def on_pull(pull, outbox):
        tasks.append(asyncio.ensure_future(compute(pull, outbox)))

    async with serving(transport, Worker(on_pull)) as endpoint:
        assert await transport.pull(endpoint, pull_of(), lambda chunk, kv: None) == done_of(pull_of())


async def test_a_throttled_sender_keeps_to_its_rate():
    size = PROMPT * LAYOUT.token_bytes
    for kind in KINDS:
        transport = kind(CREDENTIAL, kv_bytes_per_s=size / 0.2)
        async with serving(transport, Worker(prefill)) as endpoint:
            started = asyncio.get_running_loop().time()
            await transport.pull(endpoint, pull_of(), lambda chunk, kv: None)
            assert asyncio.get_running_loop().time() - started >= 0.17


PEER = """
import asyncio, sys
from transports.grpc import GrpcTransport
from transports.shared_memory import SharedMemoryTransport
from transports.transport import Credential

class Silent:
    def opened(self, gateway_id, outbox): pass
    def received(self, gateway_id, message): pass
    def closed(self, gateway_id): pass
    def pulled(self, pull, outbox): print("pulled", flush=True)

async def main():
    listener = await globals()[sys.argv[1]](Credential(secret="sesame")).serve(Silent(), "127.0.0.1", 0)
    print(listener.endpoint, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def peer(transport):
    """A worker of another process that never sends anything, with a stream and a pull on it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PEER, type(transport).__name__, stdout=asyncio.subprocess.PIPE
    )
    try:
        endpoint = (await process.stdout.readline()).decode().strip()
        link = await transport.connect(endpoint, "g0")
        pulling = asyncio.ensure_future(transport.pull(endpoint, pull_of(), lambda chunk, kv: None))
        assert await process.stdout.readline() == b"pulled\n"
        yield process, link, pulling
        await link.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_peer_that_dies_or_freezes_is_unreachable_within_its_bound(transport, how):
    async with peer(transport) as (process, link, pulling):
        process.send_signal(how)
        async with asyncio.timeout(5.9):
            heard = await asyncio.gather(anext(link.messages()), pulling, return_exceptions=True)
        assert [type(error) for error in heard] == [Unreachable, Unreachable]
        with pytest.raises(Unreachable):
            link.send(Abort(request_id="r", attempt=0))


async def test_random_bytes_never_crash_a_server(transport):
    """Whatever a caller with the secret says, it is refused and the next one is served."""
    async with serving(transport, Worker(prefill)) as endpoint:
        for data in junk():
            async with grpc.aio.insecure_channel(endpoint) as channel:
                metadata = (*transports.channel.introduce(CREDENTIAL, "g0"), ("mobula-segment", "../../etc/passwd"))
                streaming = channel.stream_stream("/mobula.Worker/Stream")(metadata=metadata)
                await streaming.write(data)
                pulling = channel.unary_stream("/mobula.Worker/Pull")(data, metadata=metadata)
                for call in (streaming, pulling):
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await call.read()
                    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert await transport.pull(endpoint, pull_of(), lambda chunk, kv: None) == done_of(pull_of())


def junk():
    """Noise, truncated messages, and well-formed ones that lie about sizes."""
    noise = np.random.default_rng(0)
    good = wire.encode(pull_of())
    yield b""
    yield b"\x91" * 5000
    yield good[: len(good) // 2]
    for layout in (KvLayout(layers=0, kv_heads=1, head_dim=1), KvLayout(layers=1, kv_heads=1, head_dim=1, dtype="object")):
        yield wire.encode(pull_of(layout))
    yield wire.encode(pull_of(skip=PROMPT))
    yield from (noise.bytes(int(size)) for size in noise.integers(1, 200, 20))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_every_decoder_refuses_what_it_cannot_read(data):
    for decode in (wire.to_worker, wire.from_worker, wire.pull_request, wire.unframe):
        with contextlib.suppress(ProtocolMismatch):
            decode(data)


def issue(directory):
    """An authority and a certificate of it for 127.0.0.1."""
    directory.mkdir()
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in "12"]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("authority", "worker")]

    def certificate(subject, key, extension):
        built = x509.CertificateBuilder().subject_name(subject).issuer_name(names[0]).public_key(key.public_key())
        built = built.serial_number(x509.random_serial_number()).add_extension(extension, critical=False)
        built = built.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(hours=1))
        return built.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    (directory / "ca.pem").write_bytes(certificate(names[0], keys[0], x509.BasicConstraints(ca=True, path_length=None)))
    (directory / "cert.pem").write_bytes(certificate(names[1], keys[1], address))
    (directory / "key.pem").write_bytes(
        keys[1].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
