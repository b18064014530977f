"""Shared memory's own promises: nothing is left behind, nothing but a segment is opened, and frames are the way out."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import numpy as np
import pytest

import transports.grpc
from cluster.errors import ProtocolMismatch, Temporary
from cluster.handoff import RequestState
from cluster.kv import KvLayout
from cluster.request import Request, SamplingParams
from transports import shared_memory
from transports.grpc import GrpcTransport
from transports.messages import KvChunk, KvDone, KvFailed, PullKv
from transports.shared_memory import SHM_DIR, SharedMemoryTransport
from transports.transport import Credential

CREDENTIAL = Credential(secret="sesame")
NAME = f"mobula-{os.getpid()}-{'0' * 32}"
PULL = PullKv(
    replica_id="p0",
    request=Request(request_id="r", model="m", prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=1)),
    attempt=0,
    skip_tokens=0,
    layout=KvLayout(layers=1, kv_heads=1, head_dim=4),
)
KV = np.arange(24, dtype=np.float32).reshape(2, 3, 1, 4)


class Worker:
    def pulled(self, pull, outbox):
        outbox.put(KvChunk(layer=0, first_token=0, tokens=3), KV)
        state = RequestState(request=pull.request, generated=(4,))
        outbox.end(KvDone(state=state, queue_s=0.0, prefill_s=0.0, cached_tokens=0))


@pytest.fixture
def segment():
    segment = shared_memory.create(NAME, 96)
    yield segment
    segment.remove()


async def pulled(receiver, sender, monkeypatch):
    """Pull once. Returns where in shared memory each piece lay; None is in its frame."""
    offsets, arrays = [], []
    located = transports.grpc._located

    def spy(piece, *rest):
        offsets.append(piece.offset)
        return located(piece, *rest)

    monkeypatch.setattr(transports.grpc, "_located", spy)
    listener = await sender.serve(Worker(), "127.0.0.1", 0)
    try:
        await receiver.pull(listener.endpoint, PULL, lambda chunk, kv: arrays.append(kv.copy()))
    finally:
        await listener.close(0)
    np.testing.assert_array_equal(arrays, [KV])
    return offsets


@pytest.mark.parametrize(
    ("receiver", "sender", "offset"),
    [
        (SharedMemoryTransport, SharedMemoryTransport, 0),
        (GrpcTransport, SharedMemoryTransport, None),
        (SharedMemoryTransport, GrpcTransport, None),
    ],
)
async def test_either_kind_serves_either_kind(receiver, sender, offset, monkeypatch):
    assert await pulled(receiver(CREDENTIAL), sender(CREDENTIAL), monkeypatch) == [offset]


async def test_kv_goes_in_frames_where_memory_is_full(monkeypatch):
    def full(file, parts, offset):
        raise OSError("no space left")

    monkeypatch.setattr(os, "pwritev", full)
    assert await pulled(SharedMemoryTransport(CREDENTIAL), SharedMemoryTransport(CREDENTIAL), monkeypatch) == [None]


async def test_a_segment_is_used_again_and_removed_with_its_transport(monkeypatch):
    transport, sender = SharedMemoryTransport(CREDENTIAL), SharedMemoryTransport(CREDENTIAL)
    names = []
    for _ in range(3):
        await pulled(transport, sender, monkeypatch)
        names += [path.name for path in SHM_DIR.glob(f"mobula-{os.getpid()}-*")]
    assert len(names) == 3
    assert len(set(names)) == 1
    del transport
    gc.collect()
    assert not (SHM_DIR / names[0]).exists()


async def test_a_worker_that_stops_leaves_no_segment(monkeypatch):
    transport = SharedMemoryTransport(CREDENTIAL)
    listener = await transport.serve(Worker(), "127.0.0.1", 0)
    await transport.pull(listener.endpoint, PULL, lambda chunk, kv: None)
    assert list(SHM_DIR.glob(f"mobula-{os.getpid()}-*"))
    await listener.close(0)
    assert not list(SHM_DIR.glob(f"mobula-{os.getpid()}-*"))


async def test_a_failed_pull_leaves_no_segment():
    class Failing:
        def pulled(self, pull, outbox):
            outbox.end(KvFailed(message="pool is full", retry=True))

    transport = SharedMemoryTransport(CREDENTIAL)
    listener = await transport.serve(Failing(), "127.0.0.1", 0)
    with pytest.raises(Temporary):
        await transport.pull(listener.endpoint, PULL, lambda chunk, kv: None)
    await listener.close(0)
    assert not list(SHM_DIR.glob(f"mobula-{os.getpid()}-*"))


async def test_spare_segments_are_bounded(monkeypatch):
    transport = SharedMemoryTransport(CREDENTIAL)
    for size in (5, 4, 3, 2, 1, 2**30):
        transport._keep(shared_memory.create(f"mobula-{os.getpid()}-{size:032x}", size))
    assert [spare.size for spare in transport._spare] == [2, 3, 4, 5]


def test_a_segment_beyond_the_free_space_is_not_created():
    assert shared_memory.create(NAME, 2**60) is None
    assert not (SHM_DIR / NAME).exists()


def test_what_one_end_writes_the_other_reads(segment):
    other = shared_memory.open_segment(NAME, 96)
    assert other.write(8, [memoryview(b"K"), memoryview(b"V")])
    other.close()
    assert segment.read(8, 2) == b"KV"
    assert segment.read(8, 2).readonly
    assert (SHM_DIR / NAME).stat().st_mode & 0o777 == 0o600


def test_a_host_without_the_segment_says_so():
    assert shared_memory.open_segment(NAME, 96) is None


@pytest.mark.parametrize(
    "name", ["../etc/passwd", "mobula-1-x", f"{NAME}/", f"{NAME}\n", f"x{NAME}", "", b"\xff", f"mobula-0-{'0' * 32}"]
)
def test_no_other_name_is_opened(name):
    with pytest.raises(ProtocolMismatch, match="no name"):
        shared_memory.open_segment(name, 96)


def test_a_segment_of_another_size_is_refused(segment):
    with pytest.raises(ProtocolMismatch, match="96 bytes, not 97"):
        shared_memory.open_segment(NAME, 97)


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "target").write_bytes(bytes(96))
    (SHM_DIR / NAME).symlink_to(tmp_path / "target")
    try:
        with pytest.raises(ProtocolMismatch):
            shared_memory.open_segment(NAME, 96)
    finally:
        (SHM_DIR / NAME).unlink()


KILLED = """
import sys
from transports import shared_memory
assert shared_memory.create(sys.argv[1], 96) is not None
print("made", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_left_goes_when_the_next_segment_is_made(segment):
    left = f"mobula-{os.getpid()}-{'1' * 32}"  # Whatever process its number names by now.
    with subprocess.Popen([sys.executable, "-c", KILLED, left], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"made\n"
        shared_memory.sweep()
        assert (SHM_DIR / left).exists()
        owner.kill()
    shared_memory.create(f"mobula-{os.getpid()}-{'2' * 32}", 96).remove()
    assert not (SHM_DIR / left).exists()
    assert (SHM_DIR / NAME).exists()
