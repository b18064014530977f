"""The prefill role: compute a prompt for another replica, and send its KV as the layers come."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from cluster.errors import MobulaError, Temporary
from cluster.handoff import RequestState
from transports.messages import KvChunk, KvDone, KvFailed, PullKv
from transports.transport import KvOutbox
from workers.engines.engine import Engine, Submission


class PrefillRole:
    """Serves pulls. Each ends by the outbox's last word or because the receiver went away; then the engine forgets it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()  # The engine's thread ends what the loop's thread began.
        self._open: set[_Export] = set()

    @property
    def busy(self) -> bool:
        """Whether a pull is under way: a lease on this replica."""
        return bool(self._open)

    def pulled(self, pull: PullKv, outbox: KvOutbox) -> None:
        if pull.layout != self._engine.layout:
            message = f"{pull.replica_id} holds KV as {self._engine.layout}, not as {pull.layout}"
            outbox.end(KvFailed(message=message, retry=True))
            return
        export = _Export(outbox, self._ended)
        with self._lock:
            self._open.add(export)
        outbox.on_cancel(lambda: self._cancelled(pull, export))
        submission = Submission(request=pull.request, attempt=pull.attempt, generated=pull.generated)
        try:
            self._engine.prefill(submission, pull.skip_tokens, export)
        except MobulaError as error:
            export.fail(str(error), retry=isinstance(error, Temporary))

    def _cancelled(self, pull: PullKv, export: _Export) -> None:
        self._engine.abort(pull.request.request_id, pull.attempt)
        self._ended(export)

    def _ended(self, export: _Export) -> None:
        with self._lock:
            self._open.discard(export)


class _Export:
    """An engine's `KvExport` that writes to a transport's outbox."""

    def __init__(self, outbox: KvOutbox, ended: Callable[[_Export], None]) -> None:
        self._outbox = outbox
        self._ended = ended

    def layer(self, layer: int, first_token: int, kv: np.ndarray) -> None:
        self._outbox.put(KvChunk(layer=layer, first_token=first_token, tokens=kv.shape[1]), kv)

    def finish(self, state: RequestState) -> None:
        first = state.first
        assert first is not None, "a prefill ends with its first token"
        queue_s, prefill_s, _ = first.times or (0.0, 0.0, 0.0)
        self._outbox.end(
            KvDone(state=state, queue_s=queue_s, prefill_s=prefill_s, cached_tokens=first.cached_tokens or 0),
        )
        self._ended(self)

    def fail(self, message: str, retry: bool) -> None:
        self._outbox.end(KvFailed(message=message, retry=retry))
        self._ended(self)
