"""From an accepted request to its tokens: wait for room, route, submit, and resume elsewhere when a worker fails.

A request's tokens are taken from its newest attempt only and each index once, so that a client cannot tell how many replicas
worked on it. What resumes is the prompt plus the tokens already taken; the receiver rebuilds sampler and text from them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping

from cluster.errors import DeadlineExceeded, Draining, InvalidRequest, MobulaError, Overloaded, Unreachable
from cluster.fleet import GatewaySpec
from cluster.handoff import Token
from cluster.kv import KvNamespace, block_hashes
from cluster.replica import Membership, Phase, Replica
from cluster.slo import Slo
from gateway.generation import Generation
from gateway.metrics import GatewayMetrics
from gateway.request_log import RequestLog
from policies.admission import Admitted, Entry, Queued, Refused
from policies.expected_output import ExpectedOutput
from policies.line import Line
from policies.policy import Router
from policies.route import Ask, Rejection, Route
from policies.routing_view import FleetView
from transports.links import WorkerLinks
from transports.messages import Abort, BlockEvents, FromWorker, PrefillSource, Report, Resync, Submit, Tokens
from transports.transport import Transport

logger = logging.getLogger(__name__)

RETRY_ROUTE_S = 0.1  # A waiting request is routed again at least so often; reports come every 200 ms.


class Dispatcher:
    """Runs on one loop. `submit` and `cancel` return at once; the rest reaches a generation through its `wake`."""

    def __init__(
        self,
        *,
        gateway_id: str,
        membership: AsyncIterator[Membership],
        transport: Transport,
        router: Router,
        spec: GatewaySpec,
        slos: Mapping[str, Slo],
        metrics: GatewayMetrics,
        request_log: RequestLog | None = None,
    ) -> None:
        self._membership = membership
        self._adopted = asyncio.Event()
        self._router = router
        self._spec = spec
        self._slos = slos
        self._metrics = metrics
        self._log = request_log
        self._view = FleetView()
        self._links = WorkerLinks(transport, gateway_id, self, silence_s=spec.silence_s)
        self._replicas: dict[str, Replica] = {}
        self._contexts: dict[str, int] = {}
        self._running: dict[str, Generation] = {}
        self._lines: dict[str, Line[Generation]] = {}
        self._outputs: dict[str, ExpectedOutput] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.draining = False

    # What the HTTP side calls.

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._follow_membership()), asyncio.create_task(self._tick())]

    async def first_table(self, bound_s: float) -> None:
        """Until it is known who serves, or so many seconds later."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(bound_s):
                await self._adopted.wait()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        waiting = [one for line in self._lines.values() for one in (*line.newcomers.values(), *line.resuming.values())]
        for generation in [*self._running.values(), *waiting]:
            self._fail(generation, Draining("the gateway stops"))
        await self._links.close()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._lines.values()))

    @property
    def in_flight(self) -> int:
        return len(self._running) + self.waiting

    def ready(self, model: str | None = None) -> bool:
        """Whether a replica (of the model) is there to decode."""
        return bool(self._contexts) if model is None else model in self._contexts

    def context_tokens(self, model: str) -> int:
        """Longest prompt plus output that a replica of the model takes. Raises Unreachable without replicas."""
        if model not in self._contexts:
            raise Unreachable(f"no replica of {model} is ready")
        return self._contexts[model]

    def submit(self, generation: Generation) -> None:
        """Accept a generation, or raise Draining, Unreachable, Overloaded or InvalidRequest: then it has ended, rejected."""
        model = generation.request.model
        self._metrics.arrived(generation.request)
        try:
            self._accept(generation)
        except MobulaError as failure:
            generation.failure = failure
            self._end(generation, "rejected")
            raise
        self._metrics.waiting(model, len(self._line(model)))

    def cancel(self, generation: Generation) -> None:
        """Nobody wants it any more. Harmless when it ended."""
        if not generation.done:
            self._withdraw(generation)
            self._end(generation, "cancelled")

    # What links say.

    def busy(self, worker_id: str) -> bool:
        return any(generation.worker_id == worker_id for generation in self._running.values())

    def heard(self, worker_id: str, message: FromWorker) -> None:
        match message:
            case Tokens():
                self._take(message)
            case Report():
                now_s = time.time()
                for load in message.loads:
                    self._view.report(load, now_s)
                self._pump()
            case BlockEvents():
                if not self._view.kv_events(message.replica_id, message.sequence, message.events):
                    with contextlib.suppress(Unreachable):
                        self._links.send(worker_id, Resync(replica_id=message.replica_id))

    def lost(self, worker_id: str, cause: str) -> None:
        self._view.suspect_worker(worker_id, time.time())
        for generation in [one for one in self._running.values() if one.worker_id == worker_id]:
            self._resume(generation, cause)
        self._pump()

    # Tokens.

    def _take(self, message: Tokens) -> None:
        now_s = time.time()
        for token in message.tokens:
            generation = self._running.get(token.request_id)
            if generation is None or token.attempt != generation.attempt or token.index < len(generation.generated):
                continue
            if token.index > len(generation.generated) and token.token_id is not None:
                self._resume(generation, "gap")
            elif token.finish in ("error", "abort"):
                self._failed(generation, token)
            else:
                self._append(generation, token, now_s)

    def _append(self, generation: Generation, token: Token, now_s: float) -> None:
        if token.times is not None:
            self._view.first_token(token.request_id, token.attempt, now_s)
            if not generation.generated:  # A later attempt's prompt is longer, and explains no first token.
                generation.times, generation.cached_tokens = token.times, token.cached_tokens
        if token.token_id is not None:
            generation.generated.append(token.token_id)
            if generation.last_s is None:
                generation.first_s = now_s
            else:
                self._metrics.gap(generation.request.model, now_s - generation.last_s)
            generation.last_s = now_s
        generation.fresh.append(token)
        if token.finish is None:
            generation.wake()
        else:
            self._release(generation)
            self._end(generation, "completed")
            self._pump()

    def _failed(self, generation: Generation, token: Token) -> None:
        if token.refused:
            self._refused(generation)
        elif token.retry or token.finish == "abort":
            self._resume(generation, "abort" if token.finish == "abort" else "error")
            self._pump()
        else:
            self._release(generation)
            said = token.error or "the engine refused the request"
            late = not generation.generated and _past_deadline(generation, time.time())
            self._fail(generation, DeadlineExceeded(said) if late else InvalidRequest(said, code="engine_error"))

    # Attempts.

    def _accept(self, generation: Generation) -> None:
        model = generation.request.model
        if self.draining:
            raise Draining("the gateway is draining")
        if not self.ready(model):
            raise Unreachable(f"no replica of {model} is ready")
        row = next(row for row in self._replicas.values() if row.model == model)
        generation.namespace = KvNamespace(
            model=row.model,
            revision=row.revision,
            salt=generation.request.salt,
            dtype=row.layout.dtype if row.layout else "float32",
            block_tokens=row.block_tokens,
        )
        generation.ask = self._ask(generation)
        generation.block_hashes = generation.ask.block_hashes
        line = self._line(model)
        while not self._offered(generation, line):
            pass  # The chosen worker's stream has just broken; it is suspect now, so this ends.

    def _ask(self, generation: Generation) -> Ask:
        request, sampling = generation.request, generation.request.sampling
        tokens = (*request.prompt, *generation.generated)
        slo = self._slos.get(request.slo_class) or Slo()
        left = max(1, sampling.max_tokens - len(generation.generated))
        return Ask(
            request_id=request.request_id,
            model=request.model,
            prompt_tokens=len(tokens),
            block_hashes=tuple(block_hashes(tokens, generation.namespace)),
            expected_output_tokens=self._output(request.model).of(left),
            max_output_tokens=left,
            ttft_slo_s=slo.ttft_s,
            tpot_slo_s=slo.tpot_s,
            excluded=generation.excluded,
        )

    def _offered(self, generation: Generation, line: Line[Generation]) -> bool:
        """Send it or let it wait; False where it was to be sent and could not. Raises Overloaded or InvalidRequest."""
        request, now_s = generation.request, time.time()
        request_id = request.request_id
        route = self._route(generation, now_s)
        if isinstance(route, Rejection) and route.retry_after_s is None:
            raise InvalidRequest(route.reason, param="prompt", code="context_length_exceeded")
        entry = Entry(
            request_id=request.request_id, tenant=request.tenant, priority=request.priority, deadline_s=request.deadline_s
        )
        room_s = route.retry_after_s if isinstance(route, Rejection) else RETRY_ROUTE_S if line.resuming else None
        match line.queue.offer(entry, now_s, room_s=room_s):
            case Admitted():
                return self._send(generation, route, now_s)
            case Queued(displaced=displaced):
                line.newcomers[request_id] = generation
                if displaced is not None:
                    message = f"its place, of {self._spec.max_queue} in the queue, went to a tenant with fewer"
                    delay_s = line.queue.retry_after_s(now_s, room_s)
                    self._fail(line.newcomers[displaced], Overloaded(message, delay_s=delay_s))
                return True
            case Refused(reason=reason, retry_after_s=retry_after_s):
                raise Overloaded(reason, delay_s=retry_after_s)

    def _route(self, generation: Generation, now_s: float) -> Route | Rejection:
        view = self._view.routing_view(generation.request.model, now_s)
        started_s = time.perf_counter()
        route = self._router.route(generation.ask, view)
        self._metrics.routed(generation.request.model, time.perf_counter() - started_s)
        return route

    def _send(self, generation: Generation, route: Route, now_s: float) -> bool:
        """False where the worker's stream is broken: then it is suspect."""
        replica, attempt = self._replicas[route.decode.replica_id], generation.attempt + 1
        source = self._replicas[route.prefill.replica_id] if route.prefill else None
        submit = Submit(
            replica_id=replica.replica_id,
            request=generation.request,
            attempt=attempt,
            generated=tuple(generation.generated),
            prefill=source and PrefillSource(replica_id=source.replica_id, endpoint=source.endpoint, host_id=source.host_id),
        )
        try:
            self._links.send(replica.worker_id, submit)
        except Unreachable:
            self._view.suspect_worker(replica.worker_id, now_s)
            return False
        self._view.charge(generation.ask, attempt, route, now_s)
        generation.attempt, generation.route, generation.worker_id = attempt, route, replica.worker_id
        generation.tried.append(replica.replica_id)
        generation.sent_tokens = len(generation.generated)
        if not generation.generated:
            generation.sent_s = now_s
        self._running[generation.request.request_id] = generation
        return True

    def _refused(self, generation: Generation) -> None:
        """A replica that drains is as idle as none: the next choice would be the next that drains, until its own report says so."""
        replica_id = generation.tried[-1]
        self._view.suspect(replica_id, time.time())
        generation.vain -= replica_id not in generation.tried[:-1]  # It costs no attempt, the first time.
        self._resume(generation, "refused")
        self._pump()

    def _resume(self, generation: Generation, cause: str) -> None:
        """Give up the present attempt and wait for another replica."""
        failed = generation.tried[-1]
        self._withdraw(generation)
        advanced = len(generation.generated) > generation.sent_tokens
        generation.vain = 1 if advanced else generation.vain + 1
        if generation.vain >= self._spec.max_attempts:
            tried = generation.tried[-generation.vain :]
            message = f"{generation.vain} attempts failed, as many as may: {', '.join(tried)}; the last was {cause}"
            self._fail(generation, Unreachable(message))
            return
        self._metrics.retried(generation.request.model, cause)
        logger.info("%s resumes after %d tokens: %s %s", generation.request.request_id, len(generation.generated), failed, cause)
        generation.excluded, generation.queued_s = frozenset((failed,)), time.time()
        generation.ask = self._ask(generation)
        self._line(generation.request.model).resuming[generation.request.request_id] = generation

    def _withdraw(self, generation: Generation) -> None:
        """Take it off its replica, or out of the queue."""
        worker_id = generation.worker_id
        if self._release(generation):
            with contextlib.suppress(Unreachable):
                self._links.send(worker_id, Abort(request_id=generation.request.request_id, attempt=generation.attempt))
        else:
            self._line(generation.request.model).leave(generation.request.request_id, time.time())

    def _release(self, generation: Generation) -> bool:
        """Whether it was running."""
        generation.worker_id = ""
        if self._running.pop(generation.request.request_id, None) is None:
            return False
        self._view.settle(generation.request.request_id, generation.attempt, time.time())
        return True

    def _fail(self, generation: Generation, failure: MobulaError) -> None:
        self._withdraw(generation)
        generation.failure = failure
        if generation.attempt < 0:
            self._metrics.rejected(failure)
        self._end(generation, "rejected" if generation.attempt < 0 else "failed")

    def _end(self, generation: Generation, outcome: str) -> None:
        generation.done = True
        model = generation.request.model
        if outcome == "completed":
            self._output(model).ended(len(generation.generated))
        self._metrics.ended(generation, outcome)
        if self._log is not None:
            self._log.write(generation, outcome)
        generation.wake()

    # Waiting.

    def _line(self, model: str) -> Line[Generation]:
        line = self._lines.get(model)
        if line is None:
            line = self._lines[model] = Line(max_waiting=self._spec.max_queue, timeout_s=self._spec.queue_timeout_s)
        return line

    def _output(self, model: str) -> ExpectedOutput:
        return self._outputs.setdefault(model, ExpectedOutput())

    def _pump(self) -> None:
        """Send whoever waits and has room now."""
        now_s = time.time()
        for model, line in self._lines.items():
            while (generation := line.first(now_s)) is not None and self._advanced(generation, line, now_s):
                pass
            self._metrics.waiting(model, len(line))

    def _advanced(self, generation: Generation, line: Line[Generation], now_s: float) -> bool:
        """Whether the first in line went on, or for ever away."""
        route = self._route(generation, now_s)
        if isinstance(route, Rejection) and generation.excluded:
            # A replica that failed it is better than none.
            generation.excluded = frozenset()
            generation.ask = self._ask(generation)
            route = self._route(generation, now_s)
        if isinstance(route, Rejection):
            hopeless = route.retry_after_s is None and self.ready(generation.request.model)
            if hopeless:
                self._fail(generation, Unreachable(route.reason))
            return hopeless
        if not self._send(generation, route, now_s):
            return True
        line.advance(generation.request.request_id, now_s)
        return True

    async def _tick(self) -> None:
        interval_s = min(RETRY_ROUTE_S, self._links.check_interval_s)
        while True:
            await asyncio.sleep(interval_s)
            try:
                self._links.check_silence()
                self._pump()
                self._expire(time.time())
            except Exception:  # One request's trouble; all others need the next tick.
                logger.exception("a tick failed")

    def _expire(self, now_s: float) -> None:
        timeout_s = self._spec.queue_timeout_s
        for model, line in self._lines.items():
            for generation in line.overdue(now_s):
                waited = f"for {timeout_s} s, as long as a request may wait"
                if _past_deadline(generation, now_s):
                    error: MobulaError = DeadlineExceeded("no replica had room before the request's timeout_s was over")
                elif self.ready(model):
                    error = Overloaded(f"no replica had room {waited}", delay_s=line.queue.retry_after_s(now_s))
                else:
                    error = Unreachable(f"no replica of {model} was ready {waited}")
                self._fail(generation, error)

    async def _follow_membership(self) -> None:
        async for membership in self._membership:
            try:
                self._adopt(membership)
                self._adopted.set()
            except Exception:  # The next table may go better, and must not be missed.
                logger.exception("table %d was not wholly taken over", membership.version)

    def _adopt(self, membership: Membership) -> None:
        now_s = time.time()
        self._replicas = {row.replica_id: row for row in membership.replicas}
        self._contexts = _contexts(membership)
        self._view.membership(membership.replicas, now_s)
        self._links.update(membership)
        for worker_id in {row.worker_id for row in membership.replicas}:
            if not self._links.connected(worker_id):
                self._view.suspect_worker(worker_id, now_s)
        for model in [model for model in self._lines if not self.ready(model)]:
            for generation in list(self._lines[model].newcomers.values()):
                self._fail(generation, Unreachable(f"no replica of {model} is ready"))
        self._pump()


def _past_deadline(generation: Generation, now_s: float) -> bool:
    deadline_s = generation.request.deadline_s
    return deadline_s is not None and now_s >= deadline_s


def _contexts(membership: Membership) -> dict[str, int]:
    """By model that a replica is ready to decode: the longest context of any."""
    contexts: dict[str, int] = {}
    for row in membership.replicas:
        if row.phase is Phase.READY and row.role.decodes:
            contexts[row.model] = max(row.context_tokens, contexts.get(row.model, 0))
    return contexts
