"""The protocols of deciding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from cluster.actions import Action, Dropped
from cluster.snapshot import ClusterSnapshot
from policies.routing_view import RoutingView


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


class Router(Protocol):
    """Chooses for one request: filter, score, pick. Pure: same request, same view, same answer."""

    def route(self, ask: Ask, view: RoutingView) -> Route | Rejection: ...


class Policy(Protocol):
    """Proposes. Pure: same snapshot, same answer. A frozen class whose fields are its config."""

    emergency: bool
    """Goes before all that are not, whatever the order in the config."""

    def decide(self, snapshot: ClusterSnapshot, accepted: Sequence[Action]) -> Sequence[Action]: ...


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a guard lets pass."""

    actions: tuple[Action, ...]
    dropped: tuple[Dropped, ...] = ()
    """What it stopped or weakened, as it was proposed."""


class Guard(Protocol):
    """Limits. May only drop or weaken, never add or strengthen."""

    def limit(self, snapshot: ClusterSnapshot, actions: Sequence[Action]) -> Verdict: ...
