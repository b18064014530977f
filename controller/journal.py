"""What was seen, decided and done, pass by pass, in one SQLite file: for restarting, for explaining and for deciding again.

A pass is written before its actions are carried out. Snapshots are frames (`frames.py`): every `KEYFRAME_EVERY` passes a whole one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, assert_never

import msgspec

from cluster.actions import Action, ChangeRole, Decision, DrainReplica, ScaleRole, StartReplica
from cluster.errors import InvalidTrace
from cluster.snapshot import ClusterSnapshot
from controller.frames import decode, encode

log = logging.getLogger(__name__)

SCHEMA = 2  # Rises when a field's meaning changes or one goes; other journals are refused.
KEYFRAME_EVERY = 60  # Reading one pass decodes at most so many frames.
MAX_BYTES = 2 * 2**30  # Two days and more of a thousand replicas; the oldest passes go first.
PRUNE_EVERY = 600  # Passes.
PAGE_BYTES = 1024  # A pass fills its last page by half: of 4 KiB pages a day of a small fleet would be a third air.
BUSY_S = 5.0  # A reader holds no lock for longer.

_TABLES = """
CREATE TABLE IF NOT EXISTS journal (schema INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS pipelines (id INTEGER PRIMARY KEY, config TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS passes (
    number INTEGER PRIMARY KEY, at_s REAL NOT NULL, epoch INTEGER NOT NULL, pipeline INTEGER NOT NULL REFERENCES pipelines,
    mode TEXT NOT NULL, keyframe INTEGER NOT NULL, changes INTEGER NOT NULL, frame BLOB NOT NULL, decision BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS passes_by_time ON passes (at_s);
CREATE INDEX IF NOT EXISTS passes_that_act ON passes (number, at_s) WHERE changes > 0;
CREATE TABLE IF NOT EXISTS shadows (
    number INTEGER NOT NULL, name TEXT NOT NULL, decision BLOB NOT NULL, PRIMARY KEY (number, name));
CREATE TABLE IF NOT EXISTS outcomes (number INTEGER NOT NULL, action INTEGER NOT NULL, at_s REAL NOT NULL, outcome TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS outcomes_by_pass ON outcomes (number);
CREATE TABLE IF NOT EXISTS touches (
    subject TEXT NOT NULL, number INTEGER NOT NULL, at_s REAL NOT NULL, PRIMARY KEY (subject, number)) WITHOUT ROWID;
"""


_OF_THE_DISK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_BUSY)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one action of a pass."""

    number: int
    """Of the pass."""
    action: int
    """Index among the decision's actions."""
    at_s: float
    outcome: str
    """`done`, or what went wrong."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One pass."""

    epoch: int
    pipeline: str
    """The effective config of policies and guards, as JSON."""
    mode: str
    """`act` or `advise`."""
    snapshot: ClusterSnapshot
    decision: Decision
    shadows: Mapping[str, Decision] = {}

    @property
    def number(self) -> int:
        return self.snapshot.pass_number


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided in one pass, without what was seen: quick to read."""

    number: int
    at_s: float
    mode: str
    decision: Decision
    shadows: Mapping[str, Decision] = {}


class Journal:
    """One writer, any number of readers in other processes. Raises OSError where the disk is full or the file is gone."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, read_only: bool = False) -> None:
        """Raises InvalidTrace for a file that is no journal or of another schema, OSError where it cannot be written."""
        self.max_bytes = max_bytes
        """Of content; may be changed, and counts from the next time that it is pruned."""
        self._path = path
        self._before: ClusterSnapshot | None = None
        self._since_keyframe = 0
        try:
            self._db = _connect(path, read_only)
            found = self._db.execute("SELECT schema FROM journal").fetchone()
        except sqlite3.DatabaseError as error:
            if not read_only and error.sqlite_errorcode & 0xFF in _OF_THE_DISK:
                raise OSError(f"journal {path}: {error}") from error
            raise InvalidTrace(f"{path} is no journal: {error}") from error
        if found is None and not read_only:
            with _as_os_error(path), self._db:
                self._db.execute("INSERT INTO journal VALUES (?)", (SCHEMA,))
        elif found is None or found[0] != SCHEMA:
            raise InvalidTrace(f"{path} is a journal of schema {found and found[0]}; this release reads {SCHEMA}")

    @property
    def in_memory(self) -> bool:
        """Ends with its process."""
        return str(self._path) == ":memory:"

    def write(self, entry: Entry) -> None:
        """The pass is on disk when this returns. After an error the next one is a keyframe, and nothing of this one is left."""
        whole = self._before is None or self._since_keyframe >= KEYFRAME_EVERY
        before, self._before = self._before, None
        frame = encode(entry.snapshot, None if whole else before)
        with _as_os_error(self._path), self._db:
            self._db.execute("INSERT OR IGNORE INTO pipelines (config) VALUES (?)", (entry.pipeline,))
            pipeline = self._db.execute("SELECT id FROM pipelines WHERE config = ?", (entry.pipeline,)).fetchone()[0]
            self._db.execute(
                "INSERT INTO passes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    entry.number,
                    entry.snapshot.now_s,
                    entry.epoch,
                    pipeline,
                    entry.mode,
                    whole,
                    len(entry.decision.actions),
                    frame,
                    _packed(entry.decision),
                ),
            )
            shadows = [(entry.number, name, _packed(decision)) for name, decision in entry.shadows.items()]
            self._db.executemany("INSERT INTO shadows VALUES (?, ?, ?)", shadows)
            touches = [(subject, entry.number, entry.snapshot.now_s) for subject in sorted(_touched(entry))]
            self._db.executemany("INSERT INTO touches VALUES (?, ?, ?)", touches)
        self._before = entry.snapshot
        self._since_keyframe = 1 if whole else self._since_keyframe + 1
        if entry.number % PRUNE_EVERY == 0:
            with _as_os_error(self._path):
                self.prune()

    def add(self, outcomes: Iterable[Outcome]) -> None:
        with _as_os_error(self._path), self._db:
            rows = [(one.number, one.action, one.at_s, one.outcome) for one in outcomes]
            self._db.executemany("INSERT INTO outcomes VALUES (?, ?, ?, ?)", rows)

    def unsettled(self, since_s: float) -> tuple[tuple[int, int, float, Action], ...]:
        """Actions since a time of which no outcome is known, oldest first: pass, index, the pass's time, action."""
        query = "SELECT number, at_s, decision FROM passes WHERE changes > 0 AND mode = 'act' AND at_s >= ? ORDER BY number"
        found = []
        for number, at_s, decision in self._readable(query, since_s):
            actions = enumerate(decision.actions)
            settled = {action for (action,) in self._db.execute("SELECT action FROM outcomes WHERE number = ?", (number,))}
            found += [(number, index, at_s, action) for index, action in actions if index not in settled]
        return tuple(found)

    def prune(self) -> None:
        """Delete the oldest passes, keyframe by keyframe, until the file's content is within its bound."""
        while self.used_bytes > self.max_bytes:
            keys = self._db.execute("SELECT number FROM passes WHERE keyframe ORDER BY number LIMIT 2").fetchall()
            if len(keys) < 2:
                return
            with self._db:
                for table in ("passes", "shadows", "outcomes", "touches"):
                    self._db.execute(f"DELETE FROM {table} WHERE number < ?", keys[1])
                self._db.execute("PRAGMA incremental_vacuum")

    @property
    def used_bytes(self) -> int:
        names = ("page_count", "freelist_count", "page_size")
        pages, free, size = (self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
        return (pages - free) * size

    def last(self) -> Entry | None:
        """The latest pass, None in an empty journal. Raises InvalidTrace where it cannot be read."""
        try:
            number = self._db.execute("SELECT max(number) FROM passes").fetchone()[0]
            return None if number is None else self.entry(number)
        except (sqlite3.DatabaseError, zlib.error, msgspec.DecodeError, LookupError) as error:
            raise InvalidTrace(f"the last pass of {self._path} cannot be read: {error!r}") from error

    def last_change(self, until_s: float = math.inf) -> int | None:
        """Number of the latest pass that had something done, up to a time; None without any."""
        return self._number("SELECT number FROM passes WHERE changes > 0 AND at_s <= ? ORDER BY number DESC LIMIT 1", until_s)

    def last_touch(self, subject: str, until_s: float = math.inf) -> int | None:
        """Number of the latest pass with an action on a group, role, node or replica, up to a time; None without any."""
        query = "SELECT number FROM touches WHERE subject = ? AND at_s <= ? ORDER BY number DESC LIMIT 1"
        found = self._number(query, subject, until_s)
        return found if found is not None else self._last_naming(subject, until_s)

    def _last_naming(self, replica_id: str, until_s: float) -> int | None:
        """Replicas are not in the index: in a fleet that is only advised they would weigh more than its passes."""
        query = "SELECT number, decision FROM passes WHERE changes > 0 AND at_s <= ? ORDER BY number DESC"
        for number, decision in self._db.execute(query, (until_s,)):
            # Decoding costs more than to look for the name, which may be a part of another's.
            named = replica_id.encode() in zlib.decompress(decision)
            if named and any(replica_id in action.claims for action in _unpacked(decision).actions):
                return int(number)
        return None

    def at(self, now_s: float) -> int | None:
        """Number of the pass in force at a time; None before the first."""
        return self._number("SELECT number FROM passes WHERE at_s <= ? ORDER BY at_s DESC, number DESC LIMIT 1", now_s)

    def entry(self, number: int) -> Entry:
        """Raises KeyError for a pass that is not here any more, or never was."""
        for entry in self.entries(number, number):
            return entry
        raise KeyError(number)

    def entries(self, first: int = 0, last: int = 2**62) -> Iterator[Entry]:
        """Passes `first` to `last`, both included, in order."""
        start = self._db.execute("SELECT max(number) FROM passes WHERE keyframe AND number <= ?", (first,)).fetchone()[0]
        rows = self._db.execute(
            "SELECT number, epoch, config, mode, keyframe, frame, decision FROM passes JOIN pipelines ON pipeline = id"
            " WHERE number BETWEEN ? AND ? ORDER BY number",
            (first if start is None else start, last),
        )
        before: ClusterSnapshot | None = None
        for number, epoch, pipeline, mode, keyframe, frame, decision in rows:
            before = decode(frame, None if keyframe else before)
            if number < first:
                continue
            yield Entry(
                epoch=epoch,
                pipeline=pipeline,
                mode=mode,
                snapshot=before,
                decision=_unpacked(decision),
                shadows=self._shadows(number),
            )

    def outcomes(self, number: int) -> tuple[Outcome, ...]:
        rows = self._db.execute("SELECT * FROM outcomes WHERE number = ? ORDER BY action, at_s", (number,))
        return tuple(Outcome(number=row[0], action=row[1], at_s=row[2], outcome=row[3]) for row in rows)

    @property
    def span(self) -> tuple[float, float] | None:
        """Times of the first and the last pass; None in an empty journal."""
        first, last = self._db.execute("SELECT min(at_s), max(at_s) FROM passes").fetchone()
        return None if first is None else (first, last)

    def count(self, since_s: float = -math.inf) -> int:
        """Passes since a time."""
        number: int = self._db.execute("SELECT count(*) FROM passes WHERE at_s >= ?", (since_s,)).fetchone()[0]
        return number

    def first_since(self, since_s: float) -> int | None:
        """Number of the first pass since a time; None without any."""
        return self._number("SELECT number FROM passes WHERE at_s >= ? ORDER BY at_s, number LIMIT 1", since_s)

    def changes(self, since_s: float = -math.inf, *, most: int) -> list[Choice]:
        """The latest passes that had something done, in order, without their shadows."""
        query = "SELECT number, at_s, mode, decision FROM passes WHERE changes > 0 AND at_s >= ? ORDER BY number DESC LIMIT ?"
        rows = self._readable(query, since_s, most)
        return [Choice(number=row[0], at_s=row[1], mode=row[2], decision=row[3]) for row in rows][::-1]

    def choices(self, since_s: float = -math.inf) -> Iterator[Choice]:
        """Every pass since a time, in order."""
        query = "SELECT number, at_s, mode, decision FROM passes WHERE number >= ? ORDER BY number"
        first = self.first_since(since_s)
        if first is None:
            return
        for number, at_s, mode, decision in self._db.execute(query, (first,)):
            shadows = self._shadows(number)
            yield Choice(number=number, at_s=at_s, mode=mode, decision=_unpacked(decision), shadows=shadows)

    def keyframe(self, number: int) -> ClusterSnapshot:
        """The last snapshot that was kept whole, up to a pass. Raises KeyError where there is none."""
        query = "SELECT frame FROM passes WHERE keyframe AND number <= ? ORDER BY number DESC LIMIT 1"
        row = self._db.execute(query, (number,)).fetchone()
        if row is None:
            raise KeyError(number)
        return decode(row[0])

    def close(self) -> None:
        self._db.close()

    def _readable(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows that end with a decision. A damaged pass is left out: whoever takes over can do without one of long ago."""
        rows, found = self._db.execute(query, values).fetchall(), []
        for *row, packed in rows:
            try:
                found.append((*row, _unpacked(packed)))
            except (zlib.error, msgspec.DecodeError) as error:
                log.error("pass %d of %s is damaged, and left out: %s", row[0], self._path, error)
        return found

    def _number(self, query: str, *values: object) -> int | None:
        row = self._db.execute(query, values).fetchone()
        return None if row is None else int(row[0])

    def _shadows(self, number: int) -> dict[str, Decision]:
        rows = self._db.execute("SELECT name, decision FROM shadows WHERE number = ? ORDER BY name", (number,))
        return {name: _unpacked(decision) for name, decision in rows}


def groups_of(snapshot: ClusterSnapshot, action: Action) -> tuple[str, ...]:
    """Names of the groups that an action is about."""
    match action:
        case ScaleRole() | StartReplica():
            return (action.group,)
        case ChangeRole():
            return (action.source, action.target)
        case DrainReplica():
            replica = snapshot.replica_by_id.get(action.replica_id)
            return () if replica is None else (replica.group,)
        case _:
            assert_never(action)


def node_of(snapshot: ClusterSnapshot, action: Action) -> str:
    """Name of the node that an action is about; empty where it is about none."""
    match action:
        case StartReplica():
            return action.node
        case ScaleRole():
            return ""
        case _:
            replica = snapshot.replica_by_id.get(action.replica_id)
            return "" if replica is None else replica.node


def _touched(entry: Entry) -> set[str]:
    """Groups, roles and nodes that `Journal.last_touch` finds the pass by. Advice is given each second: it names no node."""
    groups = {name for action in entry.decision.actions for name in groups_of(entry.snapshot, action)}
    known = entry.snapshot.group_by_name
    nodes = {node_of(entry.snapshot, action) for action in entry.decision.actions} if entry.mode == "act" else set()
    return groups | {known[name].role.value for name in groups if name in known} | nodes - {""}


def _connect(path: Path, read_only: bool) -> sqlite3.Connection:
    if read_only:
        return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_S)
    db = sqlite3.connect(path, timeout=BUSY_S)
    db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")  # What was decided must outlive the machine before it is done.
    db.executescript(_TABLES)
    return db


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """SQLite's errors as what they are to a caller: the disk's."""
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(f"journal {path}: {error}") from error


def _packed(decision: Decision) -> bytes:
    return zlib.compress(msgspec.msgpack.encode(decision))


def _unpacked(data: bytes) -> Decision:
    return msgspec.msgpack.decode(zlib.decompress(data), type=Decision)
