"""What a router is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What a router needs to know of a request; the prompt is hashed before."""

    request_id: str
    model: str
    prompt_tokens: int
    block_hashes: tuple[int, ...]
    """`cluster.kv.block_hashes` of the prompt."""
    expected_output_tokens: int
    """A guess: the gateway's running mean, bounded by max_tokens."""
    max_output_tokens: int
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    excluded: frozenset[str] = frozenset()
    """Replicas that have just failed this request."""


class Terms(Mapping[str, float]):
    """Named figures of one candidate, taken from a row of figures only when they are read: most never are."""

    __slots__ = ("_columns", "_row")

    def __init__(self, columns: Mapping[str, int], row: Sequence[float]) -> None:
        """columns: where in the row each name's figure is."""
        self._columns, self._row = columns, row

    def __getitem__(self, name: str) -> float:
        return self._row[self._columns[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        return repr(dict(self))


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate with every term that spoke for or against it, in seconds unless the name says otherwise."""

    replica_id: str
    terms: Mapping[str, float]
    score: float
    """Lower is better."""


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request goes, and why."""

    decode: Choice
    decode_runner_up: Choice | None
    prefill: Choice | None
    """None: the prompt is computed where it is decoded."""
    prefill_runner_up: Choice | None
    reason: str
    """Why prefill happens where it does, in words: "no prefill replica", "17 uncached tokens are cheaper here", ..."""
    predicted_ttft_s: float
    predicted_tpot_s: float
    cached_tokens: int
    """Of the prompt, on the replica that will compute it."""
    uncached_tokens: int


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """Nobody can take it now."""

    reason: str
    retry_after_s: float | None
    """When room is predicted; None where waiting cannot help (no replica could ever hold it)."""
