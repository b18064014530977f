"""Outcomes on disk, a line of JSON each, as they come: a run that was made is never made again, whatever ended the one after it.

One process writes; another that opens the same directory is refused. A last line that was torn by a crash is cut off.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import msgspec

from cluster.errors import InvalidConfig
from simulator.outcome import Outcome

FILE = "outcomes.jsonl"


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    of: str
    """Which run it was, for people."""
    outcome: msgspec.Raw


class Store:
    """Opened for one command, and closed after it."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory where it is missing. Raises InvalidConfig for one in use or of other content."""
        self.path = directory / FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise InvalidConfig(f"{directory}: results cannot be kept there: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._found = self._read()
        except BlockingIOError:
            self._file.close()
            raise InvalidConfig(f"{directory}: another command keeps its results there just now") from None
        except InvalidConfig:
            self._file.close()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()

    def get(self, key: str) -> Outcome | None:
        found = self._found.get(key)
        return None if found is None else msgspec.json.decode(found, type=Outcome)

    def add(self, key: str, of: str, outcome: Outcome) -> None:
        """On disk when it returns."""
        raw = msgspec.Raw(msgspec.json.encode(outcome))
        self._file.write(msgspec.json.encode(_Line(key=key, of=of, outcome=raw)) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._found[key] = raw

    def _read(self) -> dict[str, msgspec.Raw]:
        self._file.seek(0)
        found, whole = {}, 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                one = msgspec.json.decode(line, type=_Line)
            except msgspec.DecodeError as error:
                raise InvalidConfig(f"{self.path}:{number}: is no outcome of a run: {error}") from error
            found[one.key] = one.outcome.copy()
            whole += len(line)
        self._file.truncate(whole)
        return found
