"""Carries routes out: a request computed where it is decoded, or its prompt elsewhere and its KV pulled; and resumed when lost.

What live workers do between a gateway's choice and its tokens (`workers.decode`, `workers.prefill`), on simulated engines and
links.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from cluster.replica import Phase
from policies.line import Line
from policies.route import Route
from simulator.engines import Engines
from simulator.flight import NO_ROW, Flight
from simulator.gateway import SimulatedGateway
from simulator.host import Host
from simulator.links import Links
from simulator.steps.records import FINISHED, FIRST_TOKEN, PREFILL_ONLY, PREFILLED, STORED
from simulator.timeline import Timeline
from simulator.world import World


class News(NamedTuple):
    """What an engine said, on its way to the gateways."""

    at_s: float
    kind: int
    host: Host
    flight: Flight | None
    hashes: tuple[int, ...]


class Serving:
    """All requests that are on replicas."""

    def __init__(
        self, timeline: Timeline, engines: Engines, world: World, hosts: Mapping[str, Host], ended: Callable[[Flight, float], None]
    ) -> None:
        """hosts: by replica id. ended: told of each request that has had its last token."""
        self._timeline, self.engines, self._world, self._hosts, self._ended = timeline, engines, world, hosts, ended
        self.links = Links(timeline, world.link_bytes_per_s)
        self.gateways: tuple[SimulatedGateway, ...] = ()
        self._lines: list[Line[Flight]] = []
        self.on_engine: dict[int, Host] = {}
        self.idle: Callable[[Host], None] = lambda host: None
        """Told of a replica that has nothing more to do, and is not READY."""
        self._flights: dict[int, Flight] = {}
        self._pulls: dict[int, Flight] = {}
        """By the row that computes the prompt."""
        self._news: deque[News] = deque()
        self._unique = 0
        self.transfers = 0

    def serve(self, gateways: tuple[SimulatedGateway, ...]) -> None:
        """Whom engines' news are for."""
        self.gateways = gateways
        self._lines = [line for gateway in gateways for line in gateway.lines.values()]

    # ── from a gateway ──

    def send(self, flight: Flight, route: Route) -> None:
        now_s, hop_s = self._timeline.now_s, self._world.hop_s
        host = self._hosts[route.decode.replica_id]
        flight.host = host
        host.flights[flight] = None
        if not host.alive and not host.missed:  # Nobody knows yet; it goes on elsewhere once that is noticed.
            return
        if not host.alive or host.row.phase is not Phase.READY:
            self._timeline.after(2 * hop_s, partial(self._refused, flight, flight.attempt))
            return
        if route.prefill is None:
            self._compute(flight, host, now_s + hop_s)
            return
        if flight.row == NO_ROW:
            self._open(flight)
        source = self._hosts[route.prefill.replica_id]
        flight.source = source
        source.sources[flight] = None
        self._timeline.after(hop_s, partial(self._pull, flight, flight.attempt))

    def _compute(self, flight: Flight, host: Host, at_s: float) -> None:
        now_s = self._timeline.now_s
        if flight.row == NO_ROW and not flight.hashes:
            trace = flight.trace
            flight.row = self.engines.begin(
                host.engine,
                at_s,
                now_s,
                arrival_s=flight.arrival_s,
                prompt=trace.prompt_tokens,
                output=flight.output,
                priority=trace.priority,
                slo_class=flight.slo_class,
            )
            self._flights[flight.row] = flight
            return
        if flight.row == NO_ROW:
            self._open(flight)
        self.engines.submit(flight.row, host.engine, at_s, now_s)

    def _open(self, flight: Flight) -> None:
        hashes: list[int] = list(flight.hashes)
        trace, block_tokens = flight.trace, flight.host.row.block_tokens if flight.host else 1
        if hashes:  # Its answer's blocks are kept, too: numbers, which no hash is likely to be, and only itself asks for again.
            more = (trace.prompt_tokens + flight.output - 1) // block_tokens - len(hashes)
            hashes += range(self._unique, self._unique + more)
            self._unique += max(0, more)
        flight.row = self.engines.request(
            arrival_s=flight.arrival_s,
            prompt=trace.prompt_tokens,
            output=flight.output,
            hashes=hashes,
            public=len(flight.hashes),
            priority=trace.priority,
            slo_class=flight.slo_class,
        )
        self._flights[flight.row] = flight

    def _refused(self, flight: Flight, attempt: int) -> None:
        if flight.attempt == attempt and flight.host is not None and flight.gateway is not None:
            gateway, host, now_s = flight.gateway, flight.host, self._timeline.now_s
            gateway.suspect(host, now_s)
            flight.vain -= host.replica_id not in flight.tried[:-1]  # It costs no attempt, the first time.
            self._leave(flight)
            gateway.lost(flight, host.row.model, now_s)
            gateway.pump(now_s)

    # ── a prompt computed elsewhere ──

    def _pull(self, flight: Flight, attempt: int) -> None:
        """The decode replica has the request, and asks for its KV."""
        host, source, now_s = flight.host, flight.source, self._timeline.now_s
        if flight.attempt != attempt or host is None or source is None or not host.alive:
            return
        if not source.alive and not source.missed:  # Nobody knows yet; it is computed here once that is noticed.
            return
        if not source.alive or not self.engines.reserve(flight.row, host.engine, now_s):
            self.compute_where_decoded(flight)
            return
        row = self.engines.request(
            arrival_s=flight.arrival_s,
            prompt=flight.trace.prompt_tokens + flight.generated,
            output=1,
            hashes=flight.hashes,
            priority=flight.trace.priority,
            task=PREFILL_ONLY,
        )
        flight.source_row = row
        self._pulls[row] = flight
        self.engines.submit(row, source.engine, now_s + self._world.hop_s, now_s)

    def compute_where_decoded(self, flight: Flight) -> None:
        """Its prompt is not computed elsewhere, or not any more."""
        self._leave_source(flight)
        if flight.host is not None and flight.host.alive:
            now_s = self._timeline.now_s
            self.engines.take_out(flight.row, now_s)
            self.engines.submit(flight.row, flight.host.engine, now_s, now_s)

    def _prefilled(self, row: int, at_s: float) -> None:
        """Layers left while later ones were computed: what is still to go is the last one, or what computing did not cover."""
        flight = self._pulls.pop(row)
        host, source = flight.host, flight.source
        assert host is not None, "a prompt for nobody"
        assert source is not None, "a prompt from nowhere"
        request = self.engines.state.requests[row]
        took_s = at_s - float(request["started_s"])
        self.engines.state.requests["cached"][flight.row] = request["cached"]
        self.engines.free(row)
        flight.source_row = NO_ROW
        here = int(self.engines.state.requests["shared"][flight.row]) * host.row.block_tokens
        layout = host.row.layout
        assert layout is not None, "a replica without a layout was sent KV"
        size = max(0, flight.trace.prompt_tokens + flight.generated - here) * layout.token_bytes
        ahead = self.links.share(source.row.node, host.row.node) * took_s
        left = max(size / layout.layers, size - ahead)
        flight.flow = self.links.send(source.row.node, host.row.node, left, partial(self._arrived, flight, flight.attempt))

    def _arrived(self, flight: Flight, attempt: int) -> None:
        flight.flow = None
        self.transfers += 1
        self._leave_source(flight)
        self._timeline.after(self._world.transfer_setup_s, partial(self._decode, flight, attempt))

    def _decode(self, flight: Flight, attempt: int) -> None:
        if flight.attempt != attempt or flight.host is None or not flight.host.alive:
            return
        now_s = self._timeline.now_s
        requests = self.engines.state.requests
        requests["generated"][flight.row] = flight.generated + 1
        if not self.engines.take_over(flight.row, now_s):
            requests["generated"][flight.row] = flight.generated
            self.compute_where_decoded(flight)

    # ── what engines say ──

    @property
    def next_s(self) -> float:
        """When the first of what was said reaches a gateway that waits for it; infinite where none does."""
        return self._news[0].at_s if self._news and self._waits else math.inf

    @property
    def _waits(self) -> bool:
        """Whether anybody waits at a gateway for what engines say."""
        return any(line.newcomers or line.resuming for line in self._lines)

    def advance(self, until_s: float) -> bool:
        """Let engines compute. False where they stopped before `until_s`, as somebody has to react."""
        reached = self.engines.advance(until_s, self._world.hop_s if self._waits else math.inf)
        return not self._take_said() and reached

    def _take_said(self) -> bool:
        """Note what engines have said. True where a prompt is done for another replica: that is to be seen to at once."""
        urgent = False
        for said in self.engines.take_said():
            if said.kind == PREFILLED:
                self._timeline.at(max(said.time_s, self._timeline.now_s), partial(self._prefilled, said.request, said.time_s))
                urgent = True
            else:
                flight = self._flights.get(said.request) if said.kind in (FINISHED, FIRST_TOKEN) else None
                at_s = said.time_s + self._world.hop_s
                self._news.append(News(at_s, said.kind, self.on_engine[said.engine], flight, said.hashes))
        return urgent

    def close(self, host: Host) -> None:
        """Its engine ends, its work billed. What it had said before is still on its way."""
        now_s = self._timeline.now_s
        host.alive, host.gone_s = False, now_s
        host.work = self.engines.work(host.engine, now_s)
        self.engines.remove(host.engine, now_s)
        self._take_said()
        del self.on_engine[host.engine]

    def deliver(self, now_s: float) -> None:
        """What has reached the gateways by now."""
        while self._news and self._news[0].at_s <= now_s:
            news = self._news.popleft()
            self._timeline.now_s = max(self._timeline.now_s, news.at_s)
            self._heard(news)

    def _heard(self, news: News) -> None:
        flight = news.flight
        if flight is None:
            for gateway in self.gateways:
                tell = gateway.stored if news.kind == STORED else gateway.removed
                tell(news.host.replica_id, news.hashes)
        elif news.kind == FIRST_TOKEN:
            assert flight.gateway is not None, "served without a gateway"
            flight.gateway.first_token(flight, news.at_s)
        else:
            self._finish(flight, news.at_s)

    def _finish(self, flight: Flight, now_s: float) -> None:
        host, gateway = flight.host, flight.gateway
        assert host is not None, "served by nobody"
        assert gateway is not None, "served without a gateway"
        flight.cached = max(flight.cached, int(self.engines.cached_tokens[flight.row]))
        self._ended(flight, now_s)
        del self._flights[flight.row]
        self.engines.free(flight.row)
        self._leave(flight)
        gateway.finished(flight, host.row.model, now_s)

    # ── when a replica goes ──

    def lose(self, host: Host, noticed_s: float) -> None:
        """Its process is gone. Gateways notice so much later, and go on elsewhere."""
        self.close(host)
        self._timeline.after(noticed_s, partial(self._noticed, host))

    def _noticed(self, host: Host) -> None:
        now_s = self._timeline.now_s
        host.missed = True
        for gateway in self.gateways:
            gateway.suspect(host, now_s)
        for flight in list(host.sources):
            self.compute_where_decoded(flight)
        self.move_off(host)

    def move_off(self, host: Host) -> None:
        """All it decodes goes on elsewhere, token for token."""
        now_s, requests = self._timeline.now_s, self.engines.state.requests
        for flight in list(host.flights):
            if flight.row != NO_ROW:
                self.engines.take_out(flight.row, now_s)
                if requests["generated"][flight.row] >= flight.output:
                    continue  # Its last token is on its way.
                flight.generated = int(requests["generated"][flight.row])
            gateway = flight.gateway
            assert gateway is not None, "served without a gateway"
            self._leave(flight)
            gateway.lost(flight, host.row.model, now_s)
        for gateway in self.gateways:
            gateway.pump(now_s)

    def give_up(self, flight: Flight) -> None:
        """It is not served any further."""
        if flight.row != NO_ROW:
            self.engines.take_out(flight.row, self._timeline.now_s)
            del self._flights[flight.row]
            self.engines.free(flight.row)
            flight.row = NO_ROW

    def _leave(self, flight: Flight) -> None:
        """Off its replicas."""
        self._leave_source(flight)
        host, flight.host = flight.host, None
        if host is not None:
            host.flights.pop(flight, None)
            self._tell_idle(host)

    def _leave_source(self, flight: Flight) -> None:
        source, flight.source = flight.source, None
        if flight.flow is not None:
            self.links.cancel(flight.flow)
            flight.flow = None
        if flight.source_row != NO_ROW:
            self.engines.take_out(flight.source_row, self._timeline.now_s)
            del self._pulls[flight.source_row]
            self.engines.free(flight.source_row)
            flight.source_row = NO_ROW
        if source is not None:
            source.sources.pop(flight, None)
            self._tell_idle(source)

    def _tell_idle(self, host: Host) -> None:
        if not host.busy and host.alive and host.row.phase is not Phase.READY:
            self.idle(host)
