"""The decode role: generate, with the prompt computed here or its KV pulled from a prefill replica.

A pull that fails for any reason but the request's own fault ends in computing the prompt here: the client sees a later first
token and no error. Whatever the order of chunks, errors and aborts, a reservation ends by exactly one commit or abort.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
import numpy as np

from cluster.errors import InvalidRequest, MobulaError, Temporary, Unreachable
from cluster.handoff import RequestState, Token
from cluster.kv import KvLayout
from transports.messages import KvChunk, KvDone, PrefillSource, PullKv, Submit
from workers.engines.engine import Engine, KvImport, Submission

log = logging.getLogger(__name__)

Pull = Callable[[PrefillSource, PullKv, Callable[[KvChunk, np.ndarray], None]], Awaitable[KvDone]]


class DecodeRole:
    """`pull` reaches prefill replicas; `emit` takes the tokens that no engine step produces: refusals and aborts."""

    def __init__(self, engine: Engine, pull: Pull, emit: Callable[[Token], None]) -> None:
        self._engine = engine
        self._pull = pull
        self._emit = emit
        self._pulls: dict[tuple[str, int], asyncio.Task[KvDone]] = {}
        self._abandoned: str | None = None
        self.transfers = 0
        self.transfers_recomputed = 0
        self.transfer_bytes = 0

    @property
    def pulling(self) -> int:
        """Requests whose KV is on its way."""
        return len(self._pulls)

    def submit(self, submit: Submit) -> None:
        """Ends, like everything here, with exactly one token that carries `finish`."""
        submission = Submission(request=submit.request, attempt=submit.attempt, generated=submit.generated)
        layout = self._engine.layout
        if submit.prefill is None or layout is None:
            self._compute(submission)
            return
        try:
            reservation = self._engine.reserve(submission)
        except MobulaError as error:
            self._refuse(submission, error)
            return
        if reservation is None:
            self._compute(submission)
        else:
            self._begin_pull(submission, submit.prefill, layout, reservation)

    def abort(self, request_id: str, attempt: int) -> None:
        task = self._pulls.get((request_id, attempt))
        if task is None:
            self._engine.abort(request_id, attempt)
        else:
            task.cancel()

    def abandon(self, error: str) -> None:
        """End what is being pulled with that error and `retry`, and the engine's requests. Nothing may be submitted afterwards."""
        self._abandoned = error
        for task in self._pulls.values():
            task.cancel()
        self._engine.abandon(error)

    def _begin_pull(self, submission: Submission, source: PrefillSource, layout: KvLayout, reservation: KvImport) -> None:
        pull = PullKv(
            replica_id=source.replica_id,
            request=submission.request,
            attempt=submission.attempt,
            generated=submission.generated,
            skip_tokens=reservation.cached_tokens,
            layout=layout,
        )
        task = asyncio.ensure_future(self._pull(source, pull, partial(self._write, reservation)))
        self._pulls[submission.request.request_id, submission.attempt] = task
        # A callback, since a task that is cancelled before its first step runs no line of its own.
        task.add_done_callback(partial(self._settle, submission, source, reservation, time.perf_counter()))

    def _write(self, reservation: KvImport, chunk: KvChunk, kv: np.ndarray) -> None:
        reservation.write(chunk.layer, chunk.first_token, kv)
        self.transfer_bytes += kv.nbytes

    def _settle(
        self,
        submission: Submission,
        source: PrefillSource,
        reservation: KvImport,
        began_s: float,
        task: asyncio.Task[KvDone],
    ) -> None:
        """Nothing writes to the reservation any more: commit it, or give it back and do the next best thing."""
        del self._pulls[submission.request.request_id, submission.attempt]
        try:
            if task.cancelled() and self._abandoned is not None:
                self._refuse(submission, Unreachable(self._abandoned))
                return
            if task.cancelled():
                self._emit(_last(submission, "abort"))
                return
            done = task.result()
            reservation.commit(_as_pulled(done, submission.attempt, time.perf_counter() - began_s), submission.attempt)
            self.transfers += 1
        except InvalidRequest as error:
            self._refuse(submission, error)
        except Exception as error:
            if not isinstance(error, MobulaError):
                log.exception("pull of %s from %s", submission.request.request_id, source.replica_id)
            reservation.abort()
            self.transfers_recomputed += 1
            self._compute(submission)
        finally:
            reservation.abort()

    def _compute(self, submission: Submission) -> None:
        try:
            self._engine.submit(submission)
        except MobulaError as error:
            self._refuse(submission, error)

    def _refuse(self, submission: Submission, error: MobulaError) -> None:
        self._emit(_last(submission, "error", str(error), retry=isinstance(error, Temporary)))


def _last(submission: Submission, finish: str, error: str | None = None, *, retry: bool = False) -> Token:
    return Token(
        request_id=submission.request.request_id,
        attempt=submission.attempt,
        index=len(submission.generated),
        finish=finish,
        error=error,
        retry=retry,
    )


def _as_pulled(done: KvDone, attempt: int, took_s: float) -> RequestState:
    """The state to go on from, its first token telling what of the wait was neither queue nor prefill."""
    first = done.state.first
    if first is None:
        return done.state
    times = (done.queue_s, done.prefill_s, max(took_s - done.queue_s - done.prefill_s, 0.0))
    first = msgspec.structs.replace(first, attempt=attempt, times=times, cached_tokens=done.cached_tokens)
    return msgspec.structs.replace(done.state, first=first)
