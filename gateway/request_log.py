"""The request log: a line of JSON for every request that ended, without text. Written by a thread, rotated, bounded."""

from __future__ import annotations

import hashlib
import logging
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from cluster.errors import InvalidConfig
from cluster.record import RequestRecord, RouteRecord, to_line
from gateway.generation import Generation

logger = logging.getLogger(__name__)

FILE_BYTES = 64 * 2**20
FILES = 8  # With the above, at most half a GiB a gateway replica.
DIRECTORY_FILES = 64  # Of all gateway replicas and their past starts together: 4 GiB.
QUEUE_RECORDS = 8192  # Some ten seconds of full speed; beyond that records are dropped and counted.
SALT_BYTES = 32


class RequestLog:
    """A directory with `requests-<name>.jsonl` and its older parts `.1`, `.2`, ... `name` tells gateway replicas apart."""

    def __init__(
        self, directory: str, name: str, opened_s: float, *, dropped: Callable[[], None], file_bytes: int = FILE_BYTES
    ) -> None:
        """Raises InvalidConfig where the directory cannot be written. `dropped` is called, on any thread, for each record lost."""
        self._path = Path(directory) / f"requests-{name}.jsonl"
        self._opened_s = opened_s
        self._file_bytes = file_bytes
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self._salt = _salt(Path(directory) / "salt")
            self._file = self._path.open("ab")
            self._prune()
        except OSError as error:
            raise InvalidConfig(f"gateway.request_log {directory}: {error.strerror}") from error
        self._dropped = dropped
        self._queue: queue.SimpleQueue[tuple[Generation, str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="request-log", daemon=True)
        self._thread.start()

    def write(self, generation: Generation, outcome: str) -> None:
        """Queue an ended generation without waiting. One thread only, as the bound is looked at before."""
        if self._queue.qsize() >= QUEUE_RECORDS:
            self._dropped()
        else:
            self._queue.put((generation, outcome))

    def close(self) -> None:
        """Write what is queued, then close. Blocks."""
        self._queue.put(None)
        self._thread.join()
        self._file.close()

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._file.closed:  # A rotation that failed half way.
                    self._file = self._path.open("ab")
                self._file.write(to_line(self._record(*item)))
                if self._queue.empty():
                    self._file.flush()
                if self._file.tell() >= self._file_bytes:
                    self._rotate()
            except Exception as error:  # A full disk or one odd record: the next may go well.
                self._dropped()
                logger.error("request log %s: %s", self._path, error)

    def _rotate(self) -> None:
        self._file.close()
        for number in range(FILES - 2, 0, -1):
            older = self._path.with_suffix(f".jsonl.{number}")
            if older.exists():
                older.replace(self._path.with_suffix(f".jsonl.{number + 1}"))
        self._path.replace(self._path.with_suffix(".jsonl.1"))
        self._file = self._path.open("ab")
        self._prune()

    def _prune(self) -> None:
        """Each start of a gateway has a name of its own; what the oldest of them left goes."""
        ages = {path: path.stat().st_mtime for path in self._path.parent.glob("requests-*.jsonl*") if path != self._path}
        for path in sorted(ages, key=ages.__getitem__)[: max(0, len(ages) + 1 - DIRECTORY_FILES)]:
            path.unlink(missing_ok=True)

    def _record(self, generation: Generation, outcome: str) -> RequestRecord:
        request, timing = generation.request, generation.timing
        _, prefill_s, transfer_s = generation.times or (None, None, None)
        route = generation.route
        return RequestRecord(
            arrival_s=max(0.0, request.arrival_s - self._opened_s),
            prompt_tokens=len(request.prompt),
            output_tokens=len(generation.generated),
            block_hashes=tuple(self._salted(request.tenant, block) for block in generation.block_hashes),
            block_tokens=generation.namespace.block_tokens,
            tenant=request.tenant,
            slo_class=request.slo_class,
            priority=request.priority,
            request_id=request.request_id,
            http_request_id=generation.http_request_id,
            arrival_unix_s=request.arrival_s,
            key_id=generation.key_id,
            model=request.model,
            outcome=outcome,
            error=timing.error,
            attempts=len(generation.tried),
            replicas=tuple(generation.tried),
            route=None if route is None else msgspec.convert(route, RouteRecord, from_attributes=True),
            queue_s=generation.queue_s,
            prefill_s=prefill_s,
            transfer_s=transfer_s,
            decode_s=generation.decode_s,
            ttft_s=timing.ttft_s,
            tpot_s=timing.tpot_s,
            e2e_s=timing.e2e_s,
            cached_tokens=generation.cached_tokens,
        )

    def _salted(self, tenant: str, block: int) -> int:
        """Equal for equal prefixes of one tenant, and of no use to guess a prompt by."""
        data = block.to_bytes(8, "little") + tenant.encode()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=self._salt).digest(), "little")


def _salt(path: Path) -> bytes:
    """Made once a directory, so that prefixes stay equal over restarts and over the gateway's replicas."""
    try:
        path.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        if salt := path.read_bytes():
            return salt
    path.write_bytes(secrets.token_bytes(SALT_BYTES))
    return path.read_bytes()
