"""KV on its way out, layer by layer while the prompt is computed, and on its way in, into blocks that wait for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np

from cluster.errors import ProtocolMismatch, Unreachable
from cluster.handoff import RequestState
from cluster.kv import blocks_for
from workers.engines.engine import KvExport, Submission
from workers.engines.torch_engine.attention import Span
from workers.engines.torch_engine.kv_tensors import KvTensors

log = logging.getLogger(__name__)


class PromptExport:
    """A KvExport that is fed after each layer. One that raises fails its own request and no other."""

    def __init__(self, target: KvExport, skip_tokens: int = 0) -> None:
        self.target = target
        self.failure: str | None = None
        self._sent = skip_tokens

    def send_layer(self, kv: KvTensors, layer: int, span: Span) -> None:
        """Everything not yet sent up to the end of the span, tokens found in the prefix cache among it."""
        if self.failure is not None or span.end <= self._sent:
            return
        try:
            self.target.layer(layer, self._sent, kv.read(layer, span.table, self._sent, span.end))
        except Exception as error:
            log.warning("KV export failed at layer %d, token %d: %r", layer, self._sent, error)
            self.failure = f"KV export failed at layer {layer}, token {self._sent}: {error}"

    def sent_until(self, end: int) -> None:
        """All layers up to that token are out."""
        self._sent = max(self._sent, end)

    def send_all(self, kv: KvTensors, span: Span) -> None:
        """All layers of a request that is not being computed."""
        for layer in range(kv.layout.layers):
            self.send_layer(kv, layer, span)
        self.sent_until(span.end)

    def finish(self, state: RequestState) -> None:
        if self.failure is not None:
            self.fail(self.failure, retry=True)
            return
        try:
            self.target.finish(state)
        except Exception:
            log.exception("KV export of %s could not be finished", state.request.request_id)

    def fail(self, message: str, retry: bool) -> None:
        try:
            self.target.fail(message, retry)
        except Exception:
            log.exception("KV export could not be failed: %s", message)


class ReservedImport:
    """KvImport over blocks of the pool.

    grow: more blocks, for a request that generated on while it moved; raises Overloaded.
    adopt: takes state, attempt and blocks over, and runs them. release: gives the blocks back.
    """

    def __init__(
        self,
        submission: Submission,
        *,
        blocks: list[int],
        cached_tokens: int,
        kv: KvTensors,
        grow: Callable[[int], list[int]],
        adopt: Callable[[RequestState, int, list[int]], None],
        release: Callable[[list[int]], None],
    ) -> None:
        self.cached_tokens = cached_tokens
        self._request = submission.request
        self._blocks = blocks
        self._kv = kv
        self._grow, self._adopt, self._release = grow, adopt, release
        # Held while writing, so that blocks are not given back under a writer.
        self._lock = threading.Lock()
        self._open = True
        self._longest = len(self._request.prompt) + self._request.sampling.max_tokens - 1
        self._written = np.zeros((kv.layout.layers, self._longest), dtype=bool)
        self._written[:, :cached_tokens] = True

    def write(self, layer: int, first_token: int, kv: np.ndarray) -> None:
        self._check(layer, first_token, kv)
        skipped = max(self.cached_tokens - first_token, 0)
        first_token, kv = first_token + skipped, kv[:, skipped:]
        end = first_token + kv.shape[1]
        if not kv.shape[1]:
            return
        with self._lock:
            if not self._open:
                raise Unreachable(f"request {self._request.request_id}: its KV import has ended")
            missing = blocks_for(end, self._kv.layout.block_tokens) - len(self._blocks)
            if missing > 0:
                self._blocks += self._grow(missing)
            self._kv.write(layer, np.array(self._blocks), first_token, kv)
            self._written[layer, first_token:end] = True

    def commit(self, state: RequestState, attempt: int) -> None:
        if state.request.prompt != self._request.prompt or state.request.sampling != self._request.sampling:
            raise ProtocolMismatch(f"request {self._request.request_id}: its KV came with another prompt or other sampling")
        # A request that its first token ended needs no KV; its sender may have sent all the same.
        ended = state.first is not None and state.first.finish is not None
        with self._lock:
            if not self._open:
                raise Unreachable(f"request {self._request.request_id}: its KV import has ended")
            if not state.generated or state.kv_tokens > self._longest:
                raise ProtocolMismatch(f"{len(state.generated)} generated tokens outside [1, {self._request.sampling.max_tokens}]")
            if not ended and not self._written[:, : state.kv_tokens].all():
                layer, token = np.argwhere(~self._written[:, : state.kv_tokens])[0]
                raise ProtocolMismatch(f"request {self._request.request_id}: KV of token {token} in layer {layer} never came")
            self._adopt(state, attempt, self._blocks)
            self._open = False

    def abort(self) -> None:
        with self._lock:
            if self._open:
                self._open = False
                self._release(self._blocks)

    def _check(self, layer: int, first_token: int, kv: np.ndarray) -> None:
        layout = self._kv.layout
        if not 0 <= layer < layout.layers:
            raise ProtocolMismatch(f"KV for layer {layer} outside [0, {layout.layers})")
        shape = (2, kv.shape[1] if kv.ndim == 4 else -1, layout.kv_heads, layout.head_dim)
        if kv.shape != shape or kv.dtype != self._kv.wire_dtype():
            raise ProtocolMismatch(
                f"KV of shape {kv.shape} {kv.dtype}, expected [2, n, {shape[2]}, {shape[3]}] {self._kv.wire_dtype()}"
            )
        if first_token < 0 or first_token + kv.shape[1] > self._longest:
            raise ProtocolMismatch(f"KV of tokens [{first_token}, {first_token + kv.shape[1]}) outside [0, {self._longest})")
