"""What is written down: a row of a trace, and a line of the gateway's request log.

Both are JSON lines. Every `RequestRecord` line is also a `TraceRow` line, so that a request log can be replayed as it is.
No text and no token ids: lengths, times, and block hashes salted by tenant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec

from cluster.kv import BLOCK_TOKENS
from cluster.request import MAX_PRIORITY

SCHEMA: Final = 1  # Rises when a field's meaning changes or one goes; readers refuse others. New fields have defaults.

Count = Annotated[int, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Outcome = Literal["completed", "rejected", "failed", "cancelled"]


class TraceRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request that arrived, or that a generator says will."""

    schema: Literal[1] = SCHEMA
    arrival_s: Seconds
    """Since the trace's start; a request log's start is when it was opened."""
    prompt_tokens: Annotated[int, msgspec.Meta(ge=1)]
    output_tokens: Count
    block_hashes: tuple[Count, ...] = ()
    """Of the prompt's blocks, first one first; equal hashes mean equal prefixes. Empty where nothing is known."""
    block_tokens: Annotated[int, msgspec.Meta(ge=1)] = BLOCK_TOKENS
    tenant: str = "default"
    slo_class: str = "default"
    priority: Annotated[int, msgspec.Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    """Higher goes first."""
    session_id: str | None = None
    """Of the conversation it belongs to; None where unknown."""


class CandidateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that could have served, with every term that spoke for or against it."""

    replica_id: str
    terms: Mapping[str, float]
    """Seconds unless the name says otherwise."""
    score: float
    """Lower is better."""


class RouteRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request went and why.

    Fields as in `policies.route.Route`, so that `msgspec.convert(route, RouteRecord, from_attributes=True)` makes one.
    """

    decode: CandidateRecord
    decode_runner_up: CandidateRecord | None = None
    prefill: CandidateRecord | None = None
    """None: the prompt was computed where it was decoded."""
    prefill_runner_up: CandidateRecord | None = None
    reason: str = ""
    predicted_ttft_s: float
    predicted_tpot_s: float


class RequestRecord(TraceRow, frozen=True, kw_only=True):
    """What became of one request. `output_tokens` counts those the client was sent. A time of None did not occur."""

    request_id: str
    http_request_id: str = ""
    """The x-request-id that its answer carries; choices of one HTTP request share it."""
    arrival_unix_s: float
    key_id: str | None = None
    """Names the API key without revealing it; None for anonymous."""
    model: str
    outcome: Outcome
    error: str | None = None
    """Why it was rejected or failed."""
    attempts: Count = 1
    """Replicas tried; 0 if it never left the gateway's queue."""
    replicas: tuple[str, ...] = ()
    """Which decoded it or failed to, in the order they were tried."""
    route: RouteRecord | None = None
    """Of the last attempt."""
    queue_s: float | None = None
    prefill_s: float | None = None
    transfer_s: float | None = None
    decode_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    cached_tokens: int | None = None
    """Prompt tokens found in a prefix cache."""


def to_line(row: TraceRow) -> bytes:
    """One line of JSON with its newline. What equals its default is written as well: a log explains itself."""
    return msgspec.json.encode(row) + b"\n"
