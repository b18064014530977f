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
PORT = "http_port"
EPOCH = "epoch"


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


def next_epoch(directory: Path, known: int) -> int:
    """Above that of every controller before, also of one that died before it wrote a pass."""
    epoch = max(known, _number(directory / EPOCH)) + 1
    with contextlib.suppress(OSError):  # A full disk: then the journal's word is all there is.
        (directory / EPOCH).write_text(str(epoch))
    return epoch


def remember_port(directory: Path, port: int) -> None:
    """By which the next controller is found where this one was."""
    with contextlib.suppress(OSError):
        (directory / PORT).write_text(str(port))


def remembered_port(directory: Path) -> int:
    """0 where none is."""
    return _number(directory / PORT)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


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
    for name in (PORT, EPOCH):
        (directory / name).unlink(missing_ok=True)
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            (directory / f"{JOURNAL}{suffix}").replace(directory / f"journal.before.sqlite{suffix}")
