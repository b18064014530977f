"""API keys: a file of their hashes, each with its tenant. The key itself is shown once, when it is made.

A key is `mob-<id>-<secret>`. Its secret has 256 bits, so that one SHA-256 hides it as well as a slow hash would.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from cluster.errors import InvalidConfig, NotAllowed

logger = logging.getLogger(__name__)

PREFIX = "mob"
MAX_KEY_CHARS = 256
CHECK_S = 1.0  # A key that was taken out of the file opens nothing after so long.


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the file, as JSON."""

    key_id: str
    tenant: str
    sha256: str
    """Of the whole key, in hex."""
    max_priority: int = 0
    """The highest priority that its requests may ask for."""


class Keyring:
    """The keys of a file, read again when it changes. A file that cannot be read leaves the keys as they are."""

    def __init__(self, path: str, *, unreadable: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Raises InvalidConfig as `read_keys`. `unreadable` is called for each later change that cannot be read."""
        self._path = path
        self._unreadable = unreadable
        self._clock = clock
        self._checked_s = clock()
        self._stamp = _stamp(path)
        self._records = {record.key_id: record for record in read_keys(path)}

    def check(self, key: str) -> KeyRecord:
        """Raises NotAllowed for a key that is not in the file."""
        self._follow()
        parts = key.split("-", 2)
        record = self._records.get(parts[1]) if len(parts) == 3 and len(key) <= MAX_KEY_CHARS else None
        digest = _digest(key)
        if not hmac.compare_digest(digest, record.sha256 if record else "0" * len(digest)):
            raise NotAllowed("the API key is not known here")
        return record

    def _follow(self) -> None:
        now_s = self._clock()
        if now_s - self._checked_s < CHECK_S:
            return
        self._checked_s = now_s
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._records = {record.key_id: record for record in read_keys(self._path)}
        except InvalidConfig as error:
            logger.error("%s; the keys stay as they were", error)
            self._unreadable()
        else:
            logger.info("keys file %s: %d keys", self._path, len(self._records))


def read_keys(path: str) -> list[KeyRecord]:
    """Raises InvalidConfig for a file that is missing or has a broken line."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InvalidConfig(f"keys file {path}: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(msgspec.json.decode(line, type=KeyRecord))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidConfig(f"keys file {path}, line {number}: {error}") from error
    return records


def add_key(path: str, tenant: str, max_priority: int = 0) -> str:
    """Append a fresh key to the file, made where it is missing, and return the key."""
    key_id = secrets.token_hex(4)
    key = f"{PREFIX}-{key_id}-{secrets.token_urlsafe(32)}"
    record = KeyRecord(key_id=key_id, tenant=tenant, sha256=_digest(key), max_priority=max_priority)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "ab") as file:
            file.write(msgspec.json.encode(record) + b"\n")
    except OSError as error:
        raise InvalidConfig(f"keys file {path}: {error.strerror}") from error
    return key


def _stamp(path: str) -> tuple[int, int, int] | None:
    """Differs when the file was written or replaced; None where it is gone."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
