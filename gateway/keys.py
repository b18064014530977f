"""API keys: a file of their hashes, each with its tenant. The key itself is shown once, when it is made.

A key is `mob-<id>-<secret>`. Its secret has 256 bits, so that one SHA-256 hides it as well as a slow hash would.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

import msgspec

from cluster.errors import InvalidConfig, NotAllowed

PREFIX = "mob"
MAX_KEY_CHARS = 256


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the file, as JSON."""

    key_id: str
    tenant: str
    sha256: str
    """Of the whole key, in hex."""


class Keyring:
    def __init__(self, records: Iterable[KeyRecord]) -> None:
        self._records = {record.key_id: record for record in records}

    def check(self, key: str) -> KeyRecord:
        """Raises NotAllowed for a key that is not in the file."""
        parts = key.split("-", 2)
        record = self._records.get(parts[1]) if len(parts) == 3 and len(key) <= MAX_KEY_CHARS else None
        digest = _digest(key)
        if not hmac.compare_digest(digest, record.sha256 if record else "0" * len(digest)):
            raise NotAllowed("the API key is not known here")
        return record


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


def add_key(path: str, tenant: str) -> str:
    """Append a fresh key to the file, made where it is missing, and return the key."""
    key_id = secrets.token_hex(4)
    key = f"{PREFIX}-{key_id}-{secrets.token_urlsafe(32)}"
    record = KeyRecord(key_id=key_id, tenant=tenant, sha256=_digest(key))
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "ab") as file:
            file.write(msgspec.json.encode(record) + b"\n")
    except OSError as error:
        raise InvalidConfig(f"keys file {path}: {error.strerror}") from error
    return key


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
