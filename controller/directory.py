"""What survives the controller, in the fleet's directory: its config, and the journal."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sqlite3
import time
from pathlib import Path

import msgspec

from cluster.errors import InvalidConfig, InvalidTrace
from cluster.fleet import Fleet
from controller.journal import Entry, Journal

log = logging.getLogger(__name__)

CONFIG = "fleet.json"
JOURNAL = "journal.sqlite"
PORT = "http_port"
EPOCH = "epoch"
MEMORY_BYTES = 64 * 2**20  # Of passes, where no disk takes them: an hour and more of a thousand replicas.


def write_fleet(directory: Path, fleet: Fleet) -> None:
    """All or nothing; the one before is kept beside it."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        msgspec.json.decode((directory / CONFIG).read_bytes(), type=Fleet)
        shutil.copyfile(directory / CONFIG, directory / f"{CONFIG}.before")
    draft = directory / f"{CONFIG}.new"
    draft.write_bytes(msgspec.json.encode(fleet))
    draft.replace(directory / CONFIG)


def read_fleet(directory: Path) -> Fleet:
    """The one before where the last cannot be read. Raises InvalidConfig."""
    for name in (CONFIG, f"{CONFIG}.before"):
        try:
            return msgspec.json.decode((directory / name).read_bytes(), type=Fleet)
        except (OSError, msgspec.DecodeError) as error:
            log.error("%s cannot be read: %s", directory / name, error)
    raise InvalidConfig(f"{directory / CONFIG} cannot be read, nor the one before it")


def open_journal(directory: Path, max_bytes: int) -> tuple[Journal, Entry | None]:
    """The journal, and the last pass in it. A fleet is worth more than its history:

    one that cannot be read is put aside, and where none can be written the passes are kept in memory, the last ones only.
    """
    path = directory / JOURNAL
    try:
        return _opened(path, max_bytes)
    except InvalidTrace as error:
        aside = f"{JOURNAL}.{time.time_ns()}.broken"
        log.error("%s; it is kept as %s, and a new one begun", error, aside)
        _move_journal(directory, JOURNAL, aside)
    except OSError as error:
        log.error("%s; passes are kept in memory", error)
        with contextlib.suppress(InvalidTrace, sqlite3.Error):
            return in_memory(), Journal(path, read_only=True).last()
        return in_memory(), None
    try:
        return _opened(path, max_bytes)
    except OSError as error:
        log.error("%s; passes are kept in memory", error)
        return in_memory(), None


def reopened(journal: Journal, directory: Path, max_bytes: int) -> Journal:
    """The same; or, of one in memory, the one on disk as soon as that takes passes again. What was kept in memory stays there."""
    if not journal.in_memory:
        return journal
    try:
        return _opened(directory / JOURNAL, max_bytes)[0]
    except (OSError, InvalidTrace):
        return journal


def in_memory() -> Journal:
    """A journal that ends with its process."""
    return Journal(Path(":memory:"), max_bytes=MEMORY_BYTES)


def _opened(path: Path, max_bytes: int) -> tuple[Journal, Entry | None]:
    journal = Journal(path, max_bytes=max_bytes)
    try:
        return journal, journal.last()
    except InvalidTrace:
        journal.close()
        raise


def _move_journal(directory: Path, name: str, aside: str) -> None:
    """With what SQLite has not written into it yet."""
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            (directory / f"{name}{suffix}").replace(directory / f"{aside}{suffix}")


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


def put_journal_aside(directory: Path) -> None:
    """A fleet that starts anew begins a new one; the one before it can still be read."""
    for name in (PORT, EPOCH):
        (directory / name).unlink(missing_ok=True)
    _move_journal(directory, JOURNAL, "journal.before.sqlite")
