"""What a command line names, a trace file or a generator, as one ordered stream of rows.

It holds no more of a trace than its reordering does, whatever the trace's length, and finds what is wrong as it comes there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from cluster.errors import InvalidConfig
from cluster.ranges import at_least, positive
from cluster.record import TraceRow
from workloads.generators import is_generator, parse_generator
from workloads.renewal import Generator
from workloads.reshape import Scale, window
from workloads.sessions import Sessions
from workloads.traces import MAX_SPAN_S, MAX_TOKENS, Trace, open_trace


class _File:
    """A trace, and how much of it has been read."""

    span_s = math.inf

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._file: BinaryIO | None = None
        self._share = 0.0
        self.line: int | None = None
        """Of the latest row."""

    def rows(self) -> Iterator[TraceRow]:
        with self._trace.open() as self._file:
            for line, row in self._trace.numbered(self._file):
                self.line = line
                yield row

    def expected(self, until_s: float) -> None:
        """Only reading it tells."""

    def read_share(self) -> float:
        if self._file is not None and not self._file.closed:
            self._share = self._file.tell() / max(1, os.fstat(self._file.fileno()).st_size)
        return self._share


class _Made:
    """A generator with its seed."""

    line = None

    def __init__(self, generator: Generator | Sessions, seed: int) -> None:
        self._generator, self._seed = generator, seed
        self.span_s = generator.span_s

    def rows(self) -> Iterator[TraceRow]:
        return self._generator.rows(self._seed)

    def expected(self, until_s: float) -> float | None:
        return self._generator.expected(until_s)

    def read_share(self) -> float:
        """Only time tells."""
        return 0.0


class Workload:
    """Rows in order of arrival, read or made anew by each iteration; one iteration at a time.

    An iteration raises InvalidTrace at a trace's first broken line, and InvalidConfig where no request arrives or scaling makes one
    too long for any model.
    """

    def __init__(self, text: str, source: _File | _Made, start_s: float, span_s: float | None, scale: Scale) -> None:
        self.words = f"{text}, {part(start_s, span_s)}: {scale}"
        """What it is, for a report."""
        self._text, self._source, self._start_s, self._scale = text, source, start_s, scale
        self._span_s = min(math.inf if span_s is None else span_s, max(0.0, source.span_s - start_s))
        self._at_s, self._ended = 0.0, False

    @property
    def span_s(self) -> float | None:
        """Seconds that it lasts at most; None where only reading the file tells."""
        return None if math.isinf(self._span_s) else self._span_s / self._scale.rate

    @property
    def expected_rows(self) -> float | None:
        """About how many come; None where only reading or making them tells."""
        total = self._source.expected(self._start_s + self._span_s)
        return None if total is None else total - (self._source.expected(self._start_s) or 0.0)

    @property
    def read(self) -> bool:
        """Whether it is read from a file, which may hold anything, and not made."""
        return isinstance(self._source, _File)

    @property
    def place(self) -> str:
        """Where the latest row came from: file and line, or a generator and the time."""
        return f"{self._text}: at {self._at_s:g} s" if self._source.line is None else f"{self._text}:{self._source.line}"

    @property
    def progress(self) -> float:
        """Of the last iteration, in [0, 1]: by time or by bytes read, whichever is nearer its end."""
        if self._ended:
            return 1.0
        return min(1.0, max(self._source.read_share(), self._at_s / self.span_s if self.span_s else 0.0))

    def __iter__(self) -> Iterator[TraceRow]:
        self._at_s, self._ended = 0.0, False
        empty = True
        for row in self._scaled(window(self._source.rows(), self._start_s, self._span_s)):
            self._at_s, empty = row.arrival_s, False
            yield row
        if empty:
            raise InvalidConfig(f"{self._text}: no request arrives in the chosen minutes")
        self._ended = True

    def _scaled(self, rows: Iterable[TraceRow]) -> Iterator[TraceRow]:
        scale, as_recorded = self._scale, self._scale == Scale()
        for row in rows:
            if as_recorded and row.output_tokens:  # An output of none is one of a token to whoever asks for it.
                yield row
            else:
                yield self._within(row, scale(row))

    def _within(self, row: TraceRow, scaled: TraceRow) -> TraceRow:
        for name, bound in (("prompt_tokens", MAX_TOKENS), ("output_tokens", MAX_TOKENS), ("arrival_s", MAX_SPAN_S)):
            if (value := getattr(scaled, name)) > bound:
                raise InvalidConfig(f"{self._text}: {name} {getattr(row, name)} is scaled to {value}, above {bound:g}")
        return scaled


def open_workload(
    text: str, *, seed: int = 0, start_s: float = 0.0, span_s: float | None = None, scale: Scale | None = None
) -> Workload:
    """The rows of `text`, a trace file of any known format or a generator, that arrive in [start_s, start_s + span_s), scaled.

    Raises InvalidConfig for an argument out of its range, InvalidTrace for a file that is no trace.
    """
    scale = scale or Scale()
    try:
        at_least(0.0, start_s=start_s, span_s=span_s or 0.0)
        positive(**{"scale of prompts": scale.prompt, "scale of outputs": scale.output, "scale of the rate": scale.rate})
    except ValueError as error:
        raise InvalidConfig(f"{text}: {error}") from error
    source = _Made(parse_generator(text), seed) if is_generator(text) else _File(open_trace(text))
    return Workload(text, source, start_s, span_s, scale)


def part(start_s: float, span_s: float | None) -> str:
    """Which minutes of a workload, in words."""
    start = start_s / 60
    if span_s is None:
        return f"from minute {start:g}" if start else "whole"
    return f"minutes {start:g} to {start + span_s / 60:g}"
