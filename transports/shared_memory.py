"""KV between processes of one host: bytes go through /dev/shm, headers, checksums and signs of life over gRPC.

The receiver creates a segment of the size of the KV, names it in the pull, and removes it whatever happens. A sender that cannot
see it (another host after all), or a host whose /dev/shm is full, sends the bytes in the frames instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cluster.errors import ProtocolMismatch
from transports import wire
from transports.grpc import GrpcTransport
from transports.messages import KvChunk, KvDone, PullKv

SHM_DIR = Path("/dev/shm")
_NAME = re.compile(r"mobula-([1-9][0-9]{0,9})-[0-9a-f]{32}")


class SharedMemoryTransport(GrpcTransport):
    """Tokens as GrpcTransport. Serves pulls of both kinds."""

    async def pull(self, endpoint: str, pull: PullKv, write: Callable[[KvChunk, np.ndarray], None]) -> KvDone:
        name = f"mobula-{os.getpid()}-{secrets.token_hex(16)}"
        creating = asyncio.ensure_future(asyncio.to_thread(create, name, wire.kv_bytes(pull)))
        try:
            segment = await asyncio.shield(creating)
            return await self._pull(endpoint, pull, write, None if segment is None else name, segment)
        finally:
            if creating.done():
                _unlink(name)
            else:  # A thread cannot be cancelled: what it creates after us is removed when it is done.
                creating.add_done_callback(lambda _: _unlink(name))

    def _open_segment(self, name: str, size: int) -> memoryview | None:
        return open_segment(name, size)


def create(name: str, size: int) -> memoryview | None:
    """A new segment with its memory taken, so that writing to it cannot fail. None where there is no room."""
    try:
        room = os.statvfs(SHM_DIR)
        if size > room.f_bavail * room.f_frsize:
            return None
        file = os.open(SHM_DIR / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(file, 0, size)
        return memoryview(mmap.mmap(file, size))
    except OSError:
        _unlink(name)
        return None
    finally:
        os.close(file)


def open_segment(name: str, size: int) -> memoryview | None:
    """A receiver's segment; None where this host has none of that name. Raises ProtocolMismatch for any other file."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ProtocolMismatch(f"{name!r} is no name of a shared memory segment")
    try:
        file = os.open(SHM_DIR / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ProtocolMismatch(f"shared memory segment {name}: {error}") from error
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size != size:
            raise ProtocolMismatch(f"shared memory segment {name} of {found.st_size} bytes, not {size} of ours")
        return memoryview(mmap.mmap(file, size))
    finally:
        os.close(file)


def sweep() -> int:
    """Remove the segments of processes that are no more. Returns how many."""
    dead = [path.name for path in SHM_DIR.iterdir() if (match := _NAME.fullmatch(path.name)) and not _alive(int(match[1]))]
    for name in dead:
        _unlink(name)
    return len(dead)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _unlink(name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(SHM_DIR / name)
