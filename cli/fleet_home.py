"""What a running fleet leaves on disk for `up`, `down` and `status` to find it: a record, a log, a socket and a secret."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import msgspec
import psutil

from cluster.errors import InvalidConfig

MAX_SOCKET_CHARS = 107  # Of a Unix socket's path.


class ProcessId(msgspec.Struct, frozen=True, kw_only=True):
    """A process that cannot be mistaken for a later one of the same number."""

    pid: int
    started_s: float

    def find(self) -> psutil.Process | None:
        """The process, where it still runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            # Whole clock ticks apart: create_time is derived from them.
            if abs(process.create_time() - self.started_s) < 0.02 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The supervisor of a fleet, from before it starts anything until it has ended everything."""

    fleet: str
    supervisor: ProcessId
    url: str
    directory: str | None = None
    """Where a local Ray keeps its files, by which its processes are known. None with a joined one."""
    address: str | None = None
    """Of a joined Ray."""
    faults: tuple[str, ...] = ()
    """What could not be ended in order; the record outlives its supervisor then."""


class FleetHome:
    """The directory of one fleet, only for its owner's eyes."""

    def __init__(self, fleet: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", fleet):
            raise InvalidConfig(f"fleet name {fleet!r} is not made of letters, digits, `.`, `_` and `-`")
        self.path = root() / fleet
        self.record_path = self.path / "record.json"
        self.log_path = self.path / "supervisor.log"
        self.ray_logs_path = self.path / "logs"
        self.socket_path = self.path / "status.sock"
        self.secret_path = self.path / "secret"
        self.journal_path = self.path / "journal.sqlite"
        self.config_path = self.path / "fleet.json"
        if len(str(self.socket_path)) > MAX_SOCKET_CHARS:
            raise InvalidConfig(f"{self.socket_path} has {len(str(self.socket_path))} characters, above {MAX_SOCKET_CHARS}")

    def make(self) -> None:
        """Raises InvalidConfig where it cannot be written."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.log_path.write_bytes(b"")
        except OSError as error:
            raise InvalidConfig(f"{self.path} cannot be written: {error.strerror}; $MOBULA_HOME says where fleets go") from error

    def write_record(self, record: Record) -> None:
        """All or nothing, so that a reader never sees half."""
        draft = self.record_path.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(record))
        draft.replace(self.record_path)

    def record(self) -> Record | None:
        """The last record, whether its supervisor still runs or not. None where there is none.

        Raises InvalidConfig for one that does not parse.
        """
        try:
            return msgspec.json.decode(self.record_path.read_bytes(), type=Record)
        except OSError:
            return None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidConfig(
                f"{self.record_path} is broken: {error}; `mobula up` wrote into it which processes are fleet {self.path.name}'s: "
                "put it right, or end them by hand and remove it"
            ) from error

    def write_secret(self, secret: str) -> None:
        """Readable by its owner alone from the moment it exists."""
        self.secret_path.unlink(missing_ok=True)
        file = os.open(self.secret_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w") as out:
            out.write(secret)

    def clear(self) -> None:
        """All but the logs."""
        for path in (self.record_path, self.socket_path, self.secret_path):
            path.unlink(missing_ok=True)


def root() -> Path:
    """Where fleets' directories are: $MOBULA_HOME, else ~/.mobula."""
    return Path(os.environ.get("MOBULA_HOME") or Path.home() / ".mobula")


def fleets() -> tuple[str, ...]:
    """Names of the fleets that have a record."""
    return tuple(sorted(path.parent.name for path in root().glob("*/record.json")))


def only_fleet(name: str | None) -> str:
    """The fleet named, or the only one there is. Raises InvalidConfig where that is not clear."""
    if name is not None:
        return name
    found = fleets()
    if len(found) != 1:
        several = f"{len(found)} fleets are up: {', '.join(found)}; name one"
        raise InvalidConfig(several if found else f"no fleet is up; their records are under {root()}")
    return found[0]


def identify(process: psutil.Process) -> ProcessId:
    return ProcessId(pid=process.pid, started_s=process.create_time())
