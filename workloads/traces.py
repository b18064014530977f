"""Reads traces of what arrived: Azure LLM 2023 and 2024, Mooncake, BurstGPT, and our own.

The first line tells the format. Rows stream in order of arrival, so that a window of a long trace can be read without the rest;
a file in another order is refused, except that our own format's lines may be in the order of completion (`workloads.reorder`).
Times are rebased so that the first row arrives at 0, except our own format's, which already count from the trace's start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, BinaryIO, TypeVar

import msgspec

from cluster.errors import InvalidTrace
from cluster.record import TraceRow
from workloads.reorder import REORDER_ROWS, REORDER_S, in_order

MAX_LINE_BYTES = 8 * 2**20  # A million-token prompt's block hashes fit; a file that is no text does not eat the memory.
MAX_TOKENS = 2**20  # The longest context windows; a broken length does not become a prompt that eats the memory.
MAX_SPAN_S = 1e9  # Thirty years.
MAX_HASH = 2**64 - 1
SHOWN_CHARS = 60
GZIP = b"\x1f\x8b"

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
MOONCAKE_BLOCK_TOKENS = 512  # As the release's README says of `hash_ids`.
FORMATS = ("mobula", "mooncake", "azure", "burstgpt")

Lines = Iterator[tuple[int, bytes]]
Numbered = Iterator[tuple[int, TraceRow]]
Row = TypeVar("Row")


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """A trace file, its format known."""

    path: Path
    format: str
    """One of FORMATS."""

    def __iter__(self) -> Iterator[TraceRow]:
        """The rows, one by one. Raises InvalidTrace at the first broken line."""
        with self.open() as file:
            for _, row in self.numbered(file):
                yield row

    def open(self) -> BinaryIO:
        """The file, for `numbered`; how far it is read tells the progress. Raises InvalidTrace."""
        try:
            return self.path.open("rb")
        except OSError as error:
            raise InvalidTrace(f"{self.path}: {error.strerror}") from error

    def numbered(self, file: BinaryIO) -> Numbered:
        """As `__iter__`, from the opened file, each row with the line that it stands on."""
        return _READERS[self.format](str(self.path), _lines(str(self.path), file))


def open_trace(path: str | Path, format: str | None = None) -> Trace:
    """A trace whose format is read off its first line unless given. Raises InvalidTrace."""
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise InvalidTrace(f"format {format!r} is none of {', '.join(FORMATS)}")
    try:
        with path.open("rb") as file:
            line, first = next(_lines(str(path), file), (1, b""))
    except OSError as error:
        raise InvalidTrace(f"{path}: {error.strerror}") from error
    if not first:
        raise InvalidTrace(f"{path}: is empty")
    if first.startswith(GZIP):
        raise InvalidTrace(f"{path}: is compressed by gzip; unpack it first")
    return Trace(path=path, format=format or _detect(str(path), line, first))


def _detect(path: str, line: int, first: bytes) -> str:
    try:
        if first.startswith(b"{"):
            keys = msgspec.json.decode(first, type=dict[str, msgspec.Raw]).keys()
            if "arrival_s" in keys or "schema" in keys:
                return "mobula"
            if "hash_ids" in keys or "input_length" in keys:
                return "mooncake"
        else:
            columns = {name.strip() for name in first.decode().split(",")}
            if columns.issuperset(AZURE):
                return "azure"
            if columns.issuperset(BURSTGPT):
                return "burstgpt"
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    raise _invalid(
        path,
        line,
        first,
        f"a header with {', '.join(AZURE)} (Azure) or {', '.join(BURSTGPT)} (BurstGPT), "
        "or JSON with hash_ids (Mooncake) or arrival_s (Mobula)",
    )


def _lines(path: str, file: BinaryIO) -> Lines:
    """Numbered lines that are not blank, without their ends or a byte order mark."""
    number = 0
    while data := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(data) == MAX_LINE_BYTES:
            raise InvalidTrace(f"{path}:{number}: line of {MAX_LINE_BYTES} bytes or more; expected a text file of shorter lines")
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if line := data.strip():
            yield number, line


def _invalid(path: str, line: int, value: bytes | str, expected: str) -> InvalidTrace:
    text = value.decode(errors="replace") if isinstance(value, bytes) else value
    shown = repr(text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "...")
    if "\ufffd" in shown or "\\x00" in shown:
        shown = "no text in UTF-8"
    return InvalidTrace(f"{path}:{line}: {shown}: expected {expected}")


class _Clock:
    """Arrivals as seconds since the first. Raises InvalidTrace for one before its predecessor, or out of any sensible range."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._first_s: float | None = None
        self._last_s = 0.0

    def since_first(self, at_s: float, number: int, value: bytes | str) -> float:
        if self._first_s is None:
            self._first_s = self._last_s = at_s
        if at_s < self._last_s:
            expected = f"a time not before that of the row above it; it is {self._last_s - at_s:g} s before"
            raise _invalid(self._path, number, value, expected)
        if at_s - self._first_s > MAX_SPAN_S:
            raise _invalid(self._path, number, value, f"a time at most {MAX_SPAN_S:g} s after the first row's")
        self._last_s = at_s
        return at_s - self._first_s


# JSON lines


def _mobula(path: str, lines: Lines) -> Numbered:
    def late(number: int, row: TraceRow, bound_s: float) -> InvalidTrace:
        expected = f"arrival_s of at least {bound_s:g}, as rows may come at most {REORDER_S:g} s or {REORDER_ROWS} rows late"
        return _invalid(path, number, str(row.arrival_s), expected)

    return in_order(_as_written(path, lines), late)


def _as_written(path: str, lines: Lines) -> Numbered:
    decode = msgspec.json.Decoder(TraceRow).decode
    for number, line in lines:
        row = _decoded(decode, path, number, line)
        for name in ("prompt_tokens", "output_tokens", "block_tokens"):
            if getattr(row, name) > MAX_TOKENS:
                raise _invalid(path, number, str(getattr(row, name)), f"{name} of at most {MAX_TOKENS}")
        if row.arrival_s > MAX_SPAN_S:
            raise _invalid(path, number, str(row.arrival_s), f"arrival_s of at most {MAX_SPAN_S:g}")
        yield number, _hashes_checked(row, "block_hashes", path, number)


def _hashes_checked(row: TraceRow, name: str, path: str, number: int) -> TraceRow:
    if row.block_hashes and (most := max(row.block_hashes)) > MAX_HASH:
        raise _invalid(path, number, str(most), f"{name} of at most {MAX_HASH}")
    return row


Length = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]


class _MooncakeLine(msgspec.Struct, frozen=True):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Length
    output_length: Length
    hash_ids: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]


def _mooncake(path: str, lines: Lines) -> Numbered:
    decode = msgspec.json.Decoder(_MooncakeLine).decode
    clock = _Clock(path)
    for number, line in lines:
        row = _decoded(decode, path, number, line)
        shown = TraceRow(
            arrival_s=clock.since_first(row.timestamp / 1000, number, line),
            prompt_tokens=max(1, row.input_length),
            output_tokens=row.output_length,
            block_hashes=row.hash_ids,
            block_tokens=MOONCAKE_BLOCK_TOKENS,
        )
        yield number, _hashes_checked(shown, "hash_ids", path, number)


def _decoded(decode: Callable[[bytes], Row], path: str, number: int, line: bytes) -> Row:
    try:
        return decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(path, number, line, f"a whole JSON record ({error})") from error


# Comma-separated values


def _azure(path: str, lines: Lines) -> Numbered:
    clock = _Clock(path)
    for number, (at, prompt, output) in _columns(path, lines, AZURE):
        row = TraceRow(
            arrival_s=clock.since_first(_unix_s(at, path, number), number, at),
            prompt_tokens=max(1, _tokens("ContextTokens", prompt, path, number)),
            output_tokens=_tokens("GeneratedTokens", output, path, number),
        )
        yield number, row


def _burstgpt(path: str, lines: Lines) -> Numbered:
    """The first release has no `Session ID`; where a response has 0 tokens the service had failed."""
    clock = _Clock(path)
    for number, (at, prompt, output, session) in _columns(path, lines, BURSTGPT, optional=("Session ID",)):
        row = TraceRow(
            arrival_s=clock.since_first(_seconds("Timestamp", at, path, number), number, at),
            prompt_tokens=max(1, _tokens("Request tokens", prompt, path, number)),
            output_tokens=_tokens("Response tokens", output, path, number),
            session_id=session or None,
        )
        yield number, row


def _columns(path: str, lines: Lines, wanted: tuple[str, ...], optional: tuple[str, ...] = ()) -> Iterator[tuple[int, list[str]]]:
    """The wanted columns of each row after the header, then the optional ones, empty where the file has none."""
    number, header = next(lines, (1, b""))
    names = [name.strip() for name in header.decode(errors="replace").split(",")]
    if missing := [name for name in wanted if name not in names]:
        raise _invalid(path, number, header, f"a header with {', '.join(missing)}")
    places = [names.index(name) for name in wanted]
    extra = [names.index(name) if name in names else None for name in optional]
    for number, line in lines:
        fields = line.decode(errors="replace").split(",")
        if len(fields) != len(names):
            raise _invalid(path, number, line, f"{len(names)} fields ({', '.join(names)}), found {len(fields)}")
        yield number, [fields[place] for place in places] + ["" if place is None else fields[place] for place in extra]


def _tokens(name: str, text: str, path: str, number: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= MAX_TOKENS):
        raise _invalid(path, number, text, f"{name} as a whole number in [0, {MAX_TOKENS}]")
    return int(text)


def _seconds(name: str, text: str, path: str, number: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise _invalid(path, number, text, f"{name} as seconds >= 0")
    return value


def _unix_s(text: str, path: str, number: int) -> float:
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise _invalid(path, number, text, "TIMESTAMP like 2023-11-16 18:15:46.6805900, with or without +00:00") from error
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


_READERS: dict[str, Callable[[str, Lines], Numbered]] = {
    "mobula": _mobula,
    "mooncake": _mooncake,
    "azure": _azure,
    "burstgpt": _burstgpt,
}
