"""What survives the controller, in the fleet's directory: its config, and the journal."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path

import msgspec

from cluster.errors import InvalidConfig, InvalidTrace
from cluster.fleet import Fleet
from controller.journal import Journal

log = logging.getLogger(__name__)

CONFIG = "fleet.json"
JOURNAL = "journal.sqlite"


def write_fleet(directory: Path, fleet: Fleet) -> None:
    """All or nothing."""
    draft = directory / f"{CONFIG}.new"
    draft.write_bytes(msgspec.json.encode(fleet))
    draft.replace(directory / CONFIG)


def read_fleet(directory: Path) -> Fleet:
    """Raises InvalidConfig."""
    try:
        return msgspec.json.decode((directory / CONFIG).read_bytes(), type=Fleet)
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidConfig(f"{directory / 'fleet.json'} cannot be read: {error}") from error


def open_journal(directory: Path, max_bytes: int) -> Journal:
    """One that cannot be read is put aside, and a new one begun: a fleet is worth more than its history."""
    path = directory / JOURNAL
    try:
        return _readable(path, max_bytes)
    except InvalidTrace as error:
        aside = path.with_suffix(f".{time.time_ns()}.broken")
        log.error("%s; it is kept as %s, and a new one begun", error, aside)
        path.replace(aside)
        return Journal(path, max_bytes=max_bytes)


def _readable(path: Path, max_bytes: int) -> Journal:
    """One whose last pass can be gone on from."""
    journal = Journal(path, max_bytes=max_bytes)
    try:
        journal.last()
    except InvalidTrace:
        journal.close()
        raise
    return journal


def put_journal_aside(directory: Path) -> None:
    """A fleet that starts anew begins a new one; the one before it can still be read."""
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            (directory / f"{JOURNAL}{suffix}").replace(directory / f"journal.before.sqlite{suffix}")
