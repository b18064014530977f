"""A gateway in simulated time: the live router, view, line and guess of lengths; HTTP, streams and clocks are what it has not.

What `gateway.dispatch` decides of a request is decided here in the same order: offer it to the line, route it, charge the view,
resume it elsewhere when its replica is lost, give up after `max_attempts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from cluster.fleet import GatewaySpec
from cluster.kv import KvCleared, KvEvent, KvRemoved, KvStored
from cluster.replica import Load, Phase, Replica
from cluster.slo import Slo
from policies.admission import Admitted, Entry, Queued, Refused
from policies.expected_output import ExpectedOutput
from policies.line import Line
from policies.policy import Router
from policies.route import Ask, Rejection, Route
from policies.routing_view import FleetView
from simulator.counters import Counters
from simulator.flight import Flight

if TYPE_CHECKING:
    from simulator.host import Host

RETRY_ROUTE_S = 0.1

Send = Callable[[Flight, Route], None]
Rejected = Callable[[Flight, str], None]


class SimulatedGateway:
    """One of N, each with a view of its own."""

    def __init__(
        self,
        name: str,
        *,
        router: Router,
        spec: GatewaySpec,
        slos: Mapping[str, Slo],
        models: Sequence[str],
        send: Send,
        rejected: Rejected,
    ) -> None:
        """send: carry a choice out. rejected: told of requests that got no answer, and why."""
        self.name, self._router, self._spec, self._slos = name, router, spec, slos
        self._send_to, self._rejected = send, rejected
        self.view = FleetView()
        self.counters = {model: Counters(name, model) for model in models}
        self.retries = 0
        self.lines: dict[str, Line[Flight]] = {
            model: Line(max_waiting=spec.max_queue, timeout_s=spec.queue_timeout_s) for model in models
        }
        self._outputs = {model: ExpectedOutput() for model in models}
        self._ready: frozenset[str] = frozenset()
        self._told: dict[str, int] = {}
        """Block event messages of each replica."""

    @property
    def waiting(self) -> int:
        return sum(map(len, self.lines.values()))

    # ── requests ──

    def arrive(self, flight: Flight, model: str, now_s: float) -> None:
        flight.gateway = self
        counters = self.counters[model]
        counters.arrived(flight.trace.prompt_tokens)
        if model not in self._ready:
            self._give_up(flight, model, "no replica is ready")
            return
        flight.ask = self._ask(flight, model)
        self._offer(flight, model, now_s)
        counters.queued = len(self.lines[model])

    def _offer(self, flight: Flight, model: str, now_s: float) -> None:
        line = self.lines[model]
        route = self._route(flight, now_s)
        if isinstance(route, Rejection) and route.retry_after_s is None:
            self._give_up(flight, model, "longer than any replica holds")
            return
        trace = flight.trace
        entry = Entry(request_id=flight.request_id, tenant=trace.tenant, priority=trace.priority)
        room_s = route.retry_after_s if isinstance(route, Rejection) else RETRY_ROUTE_S if line.resuming else None
        match line.queue.offer(entry, now_s, room_s=room_s):
            case Admitted():
                assert isinstance(route, Route), "admitted without a route"
                self._send(flight, route, now_s)
            case Queued(displaced=displaced):
                line.newcomers[flight.request_id] = flight
                if displaced is not None:
                    self._give_up(line.newcomers.pop(displaced), model, "its place went to another tenant")
            case Refused():
                self._give_up(flight, model, "the queue is full")

    def first_token(self, flight: Flight, now_s: float) -> None:
        self.view.first_token(flight.request_id, flight.attempt, now_s)
        if flight.first_s is None:
            flight.first_s = now_s

    def finished(self, flight: Flight, model: str, now_s: float) -> None:
        self.view.settle(flight.request_id, flight.attempt, now_s)
        output = flight.output
        self._outputs[model].ended(output)
        assert flight.first_s is not None, "an answer without a first token"
        tpot_s = (now_s - flight.first_s) / (output - 1) if output > 1 else None
        counters = self.counters[model]
        counters.end(flight.trace.prompt_tokens, output, flight.cached, flight.first_s - flight.arrival_s, tpot_s)
        if len(self.lines[model]):
            self.pump(now_s)

    def lost(self, flight: Flight, model: str, now_s: float) -> None:
        """Its replica is gone: go on elsewhere from what the client has, or give up."""
        self.view.settle(flight.request_id, flight.attempt, now_s)
        failed = flight.tried[-1]
        flight.vain = 1 if flight.generated > flight.sent_generated else flight.vain + 1
        if flight.vain >= self._spec.max_attempts:
            self._give_up(flight, model, "attempts failed")
            return
        self.retries += 1
        flight.excluded, flight.queued_s = frozenset((failed,)), now_s
        flight.ask = self._ask(flight, model)
        self.lines[model].resuming[flight.request_id] = flight

    def pump(self, now_s: float) -> None:
        """Send whoever waits and has room now; end who has waited too long."""
        for model, line in self.lines.items():
            if not len(line):
                continue
            while (flight := line.first(now_s)) is not None and self._advanced(flight, model, line, now_s):
                pass
            for flight in line.overdue(now_s):
                line.leave(flight.request_id, now_s)
                self._give_up(flight, model, "no room within queue_timeout_s")
            self.counters[model].queued = len(line)

    def _advanced(self, flight: Flight, model: str, line: Line[Flight], now_s: float) -> bool:
        """Whether the first in line went on, or for ever away."""
        route = self._route(flight, now_s)
        if isinstance(route, Rejection) and flight.excluded:
            flight.excluded = frozenset()  # A replica that failed it is better than none.
            flight.ask = self._ask(flight, model)
            route = self._route(flight, now_s)
        if isinstance(route, Rejection):
            hopeless = route.retry_after_s is None and model in self._ready
            if hopeless:
                line.leave(flight.request_id, now_s)
                self._give_up(flight, model, "longer than any replica holds")
            return hopeless
        line.advance(flight.request_id, now_s)
        self._send(flight, route, now_s)
        return True

    def _send(self, flight: Flight, route: Route, now_s: float) -> None:
        assert flight.ask is not None, "routed before it was asked for"
        flight.attempt += 1
        flight.route = route
        flight.tried.append(route.decode.replica_id)
        flight.sent_generated = flight.generated
        if flight.sent_s is None:
            flight.sent_s = now_s
        self.view.charge(flight.ask, flight.attempt, route, now_s)
        self._send_to(flight, route)

    def _route(self, flight: Flight, now_s: float) -> Route | Rejection:
        assert flight.ask is not None, "routed before it was asked for"
        return self._router.route(flight.ask, self.view.routing_view(flight.ask.model, now_s))

    def _ask(self, flight: Flight, model: str) -> Ask:
        slo = self._slos.get(flight.trace.slo_class) or Slo()
        left = max(1, flight.output - flight.generated)
        return Ask(
            request_id=flight.request_id,
            model=model,
            prompt_tokens=flight.trace.prompt_tokens + flight.generated,
            block_hashes=flight.hashes,
            expected_output_tokens=self._outputs[model].of(left),
            max_output_tokens=left,
            ttft_slo_s=slo.ttft_s,
            tpot_slo_s=slo.tpot_s,
            excluded=flight.excluded,
        )

    def _give_up(self, flight: Flight, model: str, why: str) -> None:
        self.counters[model].end(flight.trace.prompt_tokens, flight.generated, 0, None, None)
        self._rejected(flight, why)

    # ── news of the fleet ──

    def adopt(self, rows: Sequence[Replica], now_s: float) -> None:
        """A new membership table. Who comes says what it holds: nothing."""
        self.view.membership(rows, now_s)
        self._ready = frozenset(row.model for row in rows if row.phase is Phase.READY and row.role.decodes)
        names = {row.replica_id for row in rows}
        for name in [name for name in self._told if name not in names]:
            del self._told[name]
        for name in sorted(names - self._told.keys()):
            self._told[name] = 0
            self._tell(name, (KvCleared(),))
        for model, line in self.lines.items():
            if model not in self._ready:
                for flight in list(line.newcomers.values()):
                    line.leave(flight.request_id, now_s)
                    self._give_up(flight, model, "no replica is ready")

    def report(self, load: Load, now_s: float) -> None:
        self.view.report(load, now_s)

    def suspect(self, host: Host, now_s: float) -> None:
        self.view.suspect(host.replica_id, now_s)

    def stored(self, replica_id: str, hashes: tuple[int, ...]) -> None:
        self._tell(replica_id, (KvStored(parent=None, hashes=hashes, tokens=()),))

    def removed(self, replica_id: str, hashes: tuple[int, ...]) -> None:
        self._tell(replica_id, (KvRemoved(hashes=hashes),))

    def _tell(self, replica_id: str, events: tuple[KvEvent, ...]) -> None:
        sequence = self._told.get(replica_id)
        if sequence is not None:
            self.view.kv_events(replica_id, sequence, events)
            self._told[replica_id] = sequence + 1
