"""What an engine is: requests in, a stream of step outputs out, KV handed over by blocks or by parameters.

Calls may come from any thread and return at once, `start` and `stop` excepted. Everything an engine has to say goes to its sink,
from its own thread: one `StepOutput` a step for all requests of that step. A request ends with exactly one token that
carries `finish`, also after `abort`.

Two ways of handing KV over fit the same calls. An engine with `kv_blocks` reads and writes its KV through `KvExport` and
`KvImport` below. One that moves KV by itself (vLLM's connectors) ends a `prefill` with `KvExport.finish` alone, its state
carrying `transfer_params`, and takes them with the submission that decodes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec
import numpy as np

from cluster.handoff import RequestState, Token
from cluster.kv import KvEvent, KvLayout
from cluster.performance import PerformanceModel
from cluster.request import Request


class EngineCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What callers may ask of an engine."""

    kv_blocks: bool
    """Exports and imports KV through KvExport and KvImport."""
    transfer_params: bool
    """Moves KV by itself, told by the parameters that come with a finished prefill."""
    live_export: bool
    """Can hand over a request that is decoding."""
    block_events: bool
    logprobs: bool


class EngineLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one engine, for the membership table and for refusing early."""

    context_tokens: int
    kv_blocks: int
    block_tokens: int
    max_running: int
    step_budget_tokens: int
    vocabulary: int


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """A request for an engine: perhaps one that already ran elsewhere."""

    request: Request
    attempt: int = 0
    generated: tuple[int, ...] = ()
    """Tokens an earlier attempt has already shown; their KV is recomputed and the next index is len(generated)."""
    transfer_params: Mapping[str, object] | None = None


class StepOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one step produced."""

    tokens: tuple[Token, ...]
    kv_events: tuple[KvEvent, ...] = ()


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's present load and its counters since start."""

    running: int
    waiting: int
    waiting_tokens: int
    kv_tokens: int
    kv_blocks_used: int
    kv_blocks_cached: int
    step_s: float
    slowdown: float
    """Measured over predicted time of the latest steps; 1 where nothing is predicted."""
    power_w: float
    steps: int
    overrun_steps: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int


Sink = Callable[[StepOutput], None]
"""Called on the engine's thread, and on that of whoever commits an import, for its first token."""


def due_s(request: Request, generated: Sequence[int], now_s: float) -> float:
    """When, on the clock that shows `now_s`, nobody wants the request's first token any more; inf where somebody always does.

    An engine ends a request then, if it has not generated anything yet.
    """
    if request.deadline_s is None or generated:
        return math.inf
    return now_s + request.deadline_s - time.time()


class KvExport(Protocol):
    """Takes one request's KV while its prompt is computed. Called from the engine's thread; must not block for long."""

    def layer(self, layer: int, first_token: int, kv: np.ndarray) -> None:
        """KV of tokens [first_token, first_token + n) in one layer, shape [2 (key, value), n, kv_heads, head_dim].

        The array is the callee's to keep. Layers of a chunk come in order, 0 first, each as soon as it is computed.
        bfloat16 comes as uint16.
        """

    def finish(self, state: RequestState) -> None:
        """The prompt is computed and the first token drawn. Called last and once, unless `fail` is."""

    def fail(self, message: str, retry: bool) -> None:
        """The request ended (abort, error) before it could be handed over."""


class KvImport(Protocol):
    """Blocks reserved for a request whose KV comes from elsewhere. Any thread may write; commit or abort ends it."""

    cached_tokens: int
    """Tokens at the front of the prompt whose KV was found here: the sender may skip them. A multiple of block_tokens."""

    def write(self, layer: int, first_token: int, kv: np.ndarray) -> None:
        """Same shape as KvExport.layer. Raises ProtocolMismatch for one that does not fit."""

    def commit(self, state: RequestState, attempt: int) -> None:
        """All KV is here: decode from the next step on. Emits `state.first` first, if there is one."""

    def abort(self) -> None:
        """Gives the blocks back. Harmless after commit or a second time."""


class Engine(Protocol):
    capabilities: EngineCapabilities
    limits: EngineLimits
    layout: KvLayout | None
    performance: PerformanceModel
    """As paced, or as measured by `warm`."""

    @property
    def alive(self) -> bool:
        """False once it has ended, by `stop` or by a fault of its own: it serves nothing any more."""

    def start(self, sink: Sink) -> None:
        """Load weights, reserve the pool, start stepping. Raises InvalidModel or InvalidConfig, leaving nothing behind."""

    def warm(self) -> None:
        """Run what makes the first request slow, and measure `performance` where it is not given by a pace. Blocks."""

    def submit(self, submission: Submission) -> None:
        """Queue a request. Raises InvalidRequest (does not fit the limits) or Overloaded."""

    def prefill(self, submission: Submission, skip_tokens: int, export: KvExport) -> None:
        """Queue a prompt to be computed here and decoded elsewhere. KV of the first `skip_tokens` tokens is not exported.

        The request emits nothing to the sink; its first token goes with `export.finish`. Raises as `submit`.
        """

    def reserve(self, submission: Submission) -> KvImport | None:
        """Blocks for a request whose KV will come; None when there is no room now (then submit it, and it is recomputed)."""

    def export_running(self, request_id: str, attempt: int, export: KvExport) -> None:
        """Take a decoding request out, whole: its KV and state go to `export`, and it emits nothing more here.

        One that is unknown, or is not decoding (it waits, its prompt is being computed, it was put back for want of blocks),
        fails the export and goes on as if nothing had been asked: it has no KV worth moving.
        """

    def abort(self, request_id: str, attempt: int | None = None) -> None:
        """End a request (that attempt of it, or every one) and free its blocks. Unknown ids are ignored."""

    def abandon(self, error: str) -> None:
        """End every request with that error and `retry`, as `stop` does, and go on serving."""

    def slow(self, factor: float) -> None:
        """Have each step last `factor` >= 1 times as long from now on: a sick machine, to be tried out. 1 heals it."""

    def load(self) -> EngineLoad: ...

    def cached_blocks(self) -> tuple[KvEvent, ...]:
        """KvCleared and then everything now shareable: the answer to a receiver that missed an event."""

    def stop(self) -> None:
        """End stepping, fail what runs with `retry`, release everything. Harmless a second time."""
