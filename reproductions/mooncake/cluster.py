"""Mooncake's cluster: prompts computed in one pool and decoded in another, prefixes shared between nodes, requests refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import msgspec

from cluster.record import TraceRow
from cluster.step_table import StepTable
from reproductions.mooncake.decodes import Admission, DecodePool
from reproductions.mooncake.flight import Flight
from reproductions.mooncake.machines import BLOCK_TOKENS, CACHE_TOKENS, LAYERS, LINK_BYTES_PER_S, TOKEN_BYTES
from reproductions.mooncake.prompts import Choice, PromptPool, Sharing
from reproductions.mooncake.served import Served, worst_gaps_s
from simulator.engines import Engines, Said
from simulator.links import Links
from simulator.steps.records import FINISHED, PREFILL_ONLY, PREFILLED, REMOVED, STORED
from simulator.timeline import Timeline

SAMPLE_S = 5.0
"""Between two looks at the load of decoding."""


class Design(msgspec.Struct, frozen=True, kw_only=True):
    """A cluster, and how it is run."""

    prompt_nodes: int
    decode_nodes: int
    sharing: Sharing = "global"
    admission: Admission = "none"
    cache_tokens: int = CACHE_TOKENS
    """Of one prompt node."""
    ttft_s: float = 30.0
    tbt_s: float = 0.1


class Cluster:
    """One run of it."""

    def __init__(self, design: Design, times: StepTable) -> None:
        self._design, self._times = design, times
        self._timeline, self._engines = Timeline(), Engines(telling=True)
        self._links = Links(self._timeline, LINK_BYTES_PER_S)
        self.prompts = PromptPool(self._engines, times, self._links, design.prompt_nodes, design.cache_tokens, design.sharing)
        self.decodes = DecodePool(self._engines, times, design.decode_nodes, design.tbt_s)
        self._prompts: dict[int, Flight] = {}
        """By the row that computes the prompt."""
        self._flights: dict[int, Flight] = {}
        """By the row that decodes."""
        self.served: list[Served] = []
        self.loads: list[float] = []
        """Of decoding, every SAMPLE_S while requests come."""

    def run(self, rows: Sequence[TraceRow], speed: float = 1.0) -> None:
        """Replay them so many times as fast as they came, until all are served."""
        self._timeline.at(0.0, partial(self._next_arrival, rows, 0, speed))
        self._timeline.at(SAMPLE_S, partial(self._sample, rows[-1].arrival_s / speed))
        while len(self.served) < len(rows):
            while not self._engines.advance(self._timeline.next_s):
                self._hear()
            self._hear()
            if math.isfinite(self._timeline.next_s):
                self._timeline.run_next()

    def prompt_seconds(self) -> float:
        """That all prompt nodes have computed."""
        return sum(self._engines.work(node.engine, self._timeline.now_s).busy_s for node in self.prompts.nodes)

    def _sample(self, until_s: float) -> None:
        now_s = self._timeline.now_s
        self.loads.append(self.decodes.mean_load(now_s))
        if now_s + SAMPLE_S < until_s:
            self._timeline.after(SAMPLE_S, partial(self._sample, until_s))

    # ── a request comes ──

    def _next_arrival(self, rows: Sequence[TraceRow], index: int, speed: float) -> None:
        if index + 1 < len(rows):
            self._timeline.at(rows[index + 1].arrival_s / speed, partial(self._next_arrival, rows, index + 1, speed))
        self._arrive(Flight(rows[index], self._timeline.now_s))

    def _arrive(self, flight: Flight) -> None:
        now_s = self._timeline.now_s
        choice = self.prompts.choose(flight.prompt, flight.hashes, now_s)
        flight.source, flight.prompt_ends_s = choice.node, now_s + choice.ttft_s
        flight.target = self.decodes.choose(flight.prompt, now_s)
        if self._refused(flight, choice.ttft_s):
            self._reject(flight)
            return
        flight.target.coming[flight] = None
        row = self._engines.request(arrival_s=now_s, prompt=flight.prompt, output=1, hashes=flight.hashes, task=PREFILL_ONLY)
        self._prompts[row] = flight
        choice.node.promise(row, choice.computing_s, now_s)
        if choice.source is None:
            self._engines.submit(row, choice.node.engine, now_s, now_s)
            return
        missing = choice.prefix - choice.node.prefix(flight.hashes)
        size = missing * BLOCK_TOKENS * TOKEN_BYTES
        self._links.send(choice.source.name, choice.node.name, size, partial(self._fetched, row, choice))

    def _refused(self, flight: Flight, ttft_s: float) -> bool:
        design, now_s = self._design, self._timeline.now_s
        match design.admission:
            case "none":
                return False
            case "late":
                return ttft_s > design.ttft_s
            case "present":
                return max(ttft_s / design.ttft_s, self.decodes.present_load(flight.target, now_s)) > 1.0
            case "predicted":
                return max(ttft_s / design.ttft_s, self.decodes.predicted_load(flight.prompt_ends_s)) > 1.0

    def _reject(self, flight: Flight, *, late: bool = False) -> None:
        self.served.append(Served(flight.prompt, flight.cached, math.inf, math.inf, late))

    def _fetched(self, row: int, choice: Choice) -> None:
        """Its prefix has come from another node."""
        now_s = self._timeline.now_s
        self.prompts.replicate(choice.node, self._prompts[row].hashes[: choice.prefix], now_s)
        self._engines.submit(row, choice.node.engine, now_s, now_s)

    # ── its prompt is computed ──

    def _prefilled(self, row: int, at_s: float) -> None:
        flight, now_s = self._prompts.pop(row), self._timeline.now_s
        request = self._engines.state.requests[row]
        flight.cached, took_s = int(request["cached"]), at_s - float(request["started_s"])
        self._engines.free(row)
        flight.source.done(row, now_s)
        del flight.target.coming[flight]
        if self._design.admission != "none" and self.decodes.present_load(flight.target, now_s) > 1.0:
            self._reject(flight, late=True)
            return
        flight.row = self._engines.request(arrival_s=flight.arrival_s, prompt=flight.prompt, output=flight.output)
        self._flights[flight.row] = flight
        self._move(flight, took_s)

    def _move(self, flight: Flight, covered_s: float) -> None:
        """Its KV leaves layer by layer while later layers are computed: what is still to go is the last layer, or what that did
        not cover. Without room it waits."""
        now_s, target = self._timeline.now_s, flight.target
        if target.waiting or not self.decodes.reserve(flight, now_s):
            target.waiting.append(flight)
            return
        self._send(flight, covered_s)

    def _send(self, flight: Flight, covered_s: float) -> None:
        target = flight.target
        target.joined[flight] = self._timeline.now_s
        target.moving_tokens += flight.prompt
        size = flight.prompt * TOKEN_BYTES
        left = max(size / LAYERS, size - covered_s * self._links.share(flight.source.name, target.name))
        self._links.send(flight.source.name, target.name, left, partial(self._moved, flight))

    def _moved(self, flight: Flight) -> None:
        now_s, target = self._timeline.now_s, flight.target
        target.moving_tokens -= flight.prompt
        self._engines.state.requests["generated"][flight.row] = 1
        if not self._engines.take_over(flight.row, now_s):
            self._engines.state.requests["generated"][flight.row] = 0
            self._engines.take_out(flight.row, now_s)
            del target.joined[flight]
            target.waiting.append(flight)

    # ── what engines say ──

    def _hear(self) -> None:
        for said in self._engines.take_said():
            if said.kind == PREFILLED:
                at_s = max(said.time_s, self._timeline.now_s)
                self._timeline.at(at_s, partial(self._prefilled, said.request, said.time_s))
            elif said.kind == FINISHED:
                self._finished(said)
            elif said.kind in (STORED, REMOVED):
                self.prompts.heard(said)

    def _finished(self, said: Said) -> None:
        flight = self._flights.pop(said.request)
        request = self._engines.state.requests[said.request]
        first_s, last_s = float(request["first_s"]), float(request["last_s"])
        tbt_s = worst_gaps_s(last_s - first_s, flight.output - 1, ())
        self.served.append(Served(flight.prompt, flight.cached, first_s - flight.arrival_s, tbt_s))
        self._engines.free(said.request)
        self.decodes.ended(flight, said.time_s)
        if flight.target.waiting:
            self._timeline.at(max(said.time_s, self._timeline.now_s), partial(self._retry, flight))

    def _retry(self, ended: Flight) -> None:
        """There may be room now for those who wait."""
        target, now_s = ended.target, self._timeline.now_s
        while target.waiting and self.decodes.reserve(target.waiting[0], now_s):
            self._send(target.waiting.popleft(), 0.0)
