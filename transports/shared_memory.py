"""KV between processes of one host: bytes go through /dev/shm, headers, checksums and signs of life over gRPC.

The receiver owns the segments. It names one in the pull, keeps it for the next pull when all went well, and removes it otherwise:
a sender that was given up might still write to it. It holds a lock on each, which the system lets go of with the process, however
that ends: a segment that nobody holds is swept away when the next one is made. A sender that cannot see a segment (another host
after all), or finds /dev/shm full, sends the bytes in the frames instead.

Both ends read and write the file rather than map it: a fault on each page of a fresh mapping costs several times the copy, and
where memory runs out a write fails and a mapping kills.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cluster.errors import ProtocolMismatch
from transports import wire
from transports.grpc import GrpcTransport
from transports.messages import KV_FRAME_BYTES, KvChunk, KvDone, PullKv
from transports.transport import Credential, Listener, WorkerService

SHM_DIR = Path("/dev/shm")
SPARE_SEGMENTS = 4  # As many pulls at once find their memory already taken from the system, which is half of the time.
SPARE_BYTES = 2**28  # Larger ones are rare and would hold memory for nothing.
_NAME = re.compile(r"mobula-[1-9][0-9]{0,9}-[0-9a-f]{32}")


class Segment:
    """A file in /dev/shm. `size` bytes of it may be used."""

    def __init__(self, name: str, file: int, size: int) -> None:
        self.name = name
        self.size = size
        self._file = file
        self._buffer = bytearray(KV_FRAME_BYTES)

    def write(self, offset: int, parts: Sequence[memoryview]) -> bool:
        """False when there is no memory left."""
        try:
            return os.pwritev(self._file, parts, offset) == sum(map(len, parts))
        except OSError:
            return False

    def read(self, offset: int, size: int) -> memoryview:
        """Valid until the next read. Shorter than `size` where the file ends."""
        if size > len(self._buffer):
            self._buffer = bytearray(size)
        view = memoryview(self._buffer)[:size]
        return view[: os.preadv(self._file, [view], offset)].toreadonly()

    def close(self) -> None:
        os.close(self._file)

    def remove(self) -> None:
        _unlink(self.name)
        self.close()


class _Listener:
    """Closing it ends a worker's pulls as well: its spare segments go, for a process may end without a word."""

    def __init__(self, listener: Listener, spare: list[Segment]) -> None:
        self._listener = listener
        self._spare = spare
        self.endpoint = listener.endpoint

    async def close(self, grace_s: float) -> None:
        await self._listener.close(grace_s)
        _remove_all(self._spare)


class SharedMemoryTransport(GrpcTransport):
    """Tokens as GrpcTransport. Serves pulls of both kinds."""

    def __init__(self, credential: Credential, *, kv_bytes_per_s: float | None = None) -> None:
        super().__init__(credential, kv_bytes_per_s=kv_bytes_per_s)
        self._spare: list[Segment] = []
        weakref.finalize(self, _remove_all, self._spare)  # At the process's end, too.

    async def serve(self, service: WorkerService, host: str, port: int) -> Listener:
        sweep()
        return _Listener(await super().serve(service, host, port), self._spare)

    async def pull(self, endpoint: str, pull: PullKv, write: Callable[[KvChunk, np.ndarray], None]) -> KvDone:
        segment = self._take(wire.kv_bytes(pull))
        if segment is None:
            return await super().pull(endpoint, pull, write)
        try:
            done = await self._pull(endpoint, pull, write, segment)
        except BaseException:
            segment.remove()
            raise
        self._keep(segment)
        return done

    def _take(self, size: int) -> Segment | None:
        for index, segment in enumerate(self._spare):
            if segment.size >= size:
                return self._spare.pop(index)
        return create(f"mobula-{os.getpid()}-{secrets.token_hex(16)}", size)

    def _keep(self, segment: Segment) -> None:
        """The largest are kept, smallest first, for they fit most pulls."""
        if segment.size > SPARE_BYTES:
            segment.remove()
            return
        self._spare.append(segment)
        self._spare.sort(key=lambda spare: spare.size)
        if len(self._spare) > SPARE_SEGMENTS:
            self._spare.pop(0).remove()

    def _open_segment(self, name: str, size: int) -> Segment | None:
        return open_segment(name, size)


def create(name: str, size: int) -> Segment | None:
    """A new segment, locked; None where there is no room for it."""
    sweep()
    try:
        room = os.statvfs(SHM_DIR)
        if size > room.f_bavail * room.f_frsize:
            return None
        file = os.open(SHM_DIR / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Another's sweep may have come between: then it is gone.
        os.ftruncate(file, size)
    except OSError:
        _unlink(name)
        os.close(file)
        return None
    return Segment(name, file, size)


def open_segment(name: str, size: int) -> Segment | None:
    """A receiver's segment; None where this host has none of that name. Raises ProtocolMismatch for any other file."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ProtocolMismatch(f"{name!r} is no name of a shared memory segment")
    try:
        file = os.open(SHM_DIR / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ProtocolMismatch(f"shared memory segment {name}: {error}") from error
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size < size:
        os.close(file)
        raise ProtocolMismatch(f"shared memory segment {name} of {found.st_size} bytes, not {size} of ours")
    return Segment(name, file, size)


def sweep() -> int:
    """Remove the segments of processes that are no more. Returns how many."""
    names = [path.name for path in SHM_DIR.iterdir() if _NAME.fullmatch(path.name)]
    return sum(_removed_if_left(name) for name in names)


def _removed_if_left(name: str) -> bool:
    try:
        file = os.open(SHM_DIR / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # Gone by now, or another user's.
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _unlink(name)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def _unlink(name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(SHM_DIR / name)


def _remove_all(segments: list[Segment]) -> None:
    while segments:
        segments.pop().remove()
