"""KV of the emulated engine: the right shapes and bytes, zeros inside."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np

from cluster.errors import ProtocolMismatch, Unreachable
from cluster.handoff import RequestState
from cluster.kv import DTYPE_BYTES, KvLayout
from workers.engines.engine import KvExport, Submission

log = logging.getLogger(__name__)


class Sender:
    """Feeds one KvExport. One that raises fails its own request and no other."""

    def __init__(self, target: KvExport, layout: KvLayout, skip_tokens: int = 0) -> None:
        self._target = target
        self._layout = layout
        self._sent = skip_tokens
        self._ended = False

    def send_until(self, end: int) -> None:
        """All layers of the tokens up to `end` that are not out yet."""
        if self._ended or end <= self._sent:
            return
        layout, first = self._layout, self._sent
        try:
            for layer in range(layout.layers):
                self._target.layer(layer, first, np.zeros((2, end - first, layout.kv_heads, layout.head_dim), wire_dtype(layout)))
            self._sent = end
        except Exception as error:
            log.warning("KV export failed at token %d: %r", first, error)
            self.fail(f"KV export failed at token {first}: {error}", retry=True)

    def finish(self, state: RequestState) -> None:
        self._last(lambda: self._target.finish(state))

    def fail(self, message: str, retry: bool) -> None:
        self._last(lambda: self._target.fail(message, retry))

    def _last(self, word: Callable[[], None]) -> None:
        if self._ended:
            return
        self._ended = True
        try:
            word()
        except Exception:
            log.exception("a KV export could not be ended")


class ReservedImport:
    """Implements KvImport: checks what comes, and keeps none of it.

    adopt: takes state and attempt over and runs them. release: gives the blocks back.
    """

    def __init__(
        self,
        submission: Submission,
        layout: KvLayout,
        cached_tokens: int,
        *,
        adopt: Callable[[RequestState, int], None],
        release: Callable[[], None],
    ) -> None:
        self.cached_tokens = cached_tokens
        self._request = submission.request
        self._layout = layout
        self._adopt, self._release = adopt, release
        self._lock = threading.Lock()
        self._open = True
        self._longest = len(self._request.prompt) + self._request.sampling.max_tokens - 1
        self._written = np.zeros((layout.layers, self._longest), dtype=bool)
        self._written[:, :cached_tokens] = True

    def write(self, layer: int, first_token: int, kv: np.ndarray) -> None:
        self._check(layer, first_token, kv)
        with self._lock:
            self._refuse_when_ended()
            self._written[layer, first_token : first_token + kv.shape[1]] = True

    def commit(self, state: RequestState, attempt: int) -> None:
        if state.request.prompt != self._request.prompt or state.request.sampling != self._request.sampling:
            raise ProtocolMismatch(f"request {self._request.request_id}: its KV came with another prompt or other sampling")
        # A request that its first token ended needs no KV; its sender may have sent all the same.
        ended = state.first is not None and state.first.finish is not None
        with self._lock:
            self._refuse_when_ended()
            if not state.generated or state.kv_tokens > self._longest:
                raise ProtocolMismatch(f"{len(state.generated)} generated tokens outside [1, {self._request.sampling.max_tokens}]")
            missing = np.argwhere(~self._written[:, : state.kv_tokens])
            if len(missing) and not ended:
                layer, token = missing[0]
                raise ProtocolMismatch(f"request {self._request.request_id}: KV of token {token} in layer {layer} never came")
            self._adopt(state, attempt)
            self._open = False

    def abort(self) -> None:
        with self._lock:
            if self._open:
                self._open = False
                self._release()

    def _refuse_when_ended(self) -> None:
        if not self._open:
            raise Unreachable(f"request {self._request.request_id}: its KV import has ended")

    def _check(self, layer: int, first_token: int, kv: np.ndarray) -> None:
        layout, wanted = self._layout, wire_dtype(self._layout)
        if not 0 <= layer < layout.layers:
            raise ProtocolMismatch(f"KV for layer {layer} outside [0, {layout.layers})")
        if kv.ndim != 4 or kv.shape[0] != 2 or kv.shape[2:] != (layout.kv_heads, layout.head_dim) or kv.dtype != wanted:
            expected = f"[2, n, {layout.kv_heads}, {layout.head_dim}] {wanted}"
            raise ProtocolMismatch(f"KV of shape {kv.shape} {kv.dtype}, expected {expected}")
        if first_token < 0 or first_token + kv.shape[1] > self._longest:
            raise ProtocolMismatch(f"KV of tokens [{first_token}, {first_token + kv.shape[1]}) outside [0, {self._longest})")


def wire_dtype(layout: KvLayout) -> np.dtype:
    """NumPy has no bfloat16 nor float8: their bits travel as integers."""
    if layout.dtype in ("float32", "float16"):
        return np.dtype(layout.dtype)
    return np.dtype(f"uint{8 * DTYPE_BYTES[layout.dtype]}")
