"""The other side of the comparison: as many nodes that each do all of a request, prompts before decodes, as vLLM did then."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from cluster.record import TraceRow
from cluster.step_table import StepTable
from reproductions.mooncake.flight import Flight
from reproductions.mooncake.machines import BLOCK_TOKENS, memory_tokens
from reproductions.mooncake.served import Served, worst_gaps_s
from simulator.engines import Engines
from simulator.steps.engines import RUNNING, WAITS
from simulator.steps.records import FINISHED, PROMPTS_FIRST

PLACES, STEP_TOKENS = 256, 16_384
"""vLLM's default batch. A longer prompt than a step takes is computed alone, whole."""
TOUCHING_S = 1e-9
"""Two steps of prompts no further apart are one stall: no decode step was between them."""


class Answer:
    """Of one node to one request."""

    __slots__ = ("cached", "engine", "first_s", "flight", "last_s")

    def __init__(self, flight: Flight, engine: int, first_s: float, last_s: float, cached: int) -> None:
        self.flight, self.engine, self.first_s, self.last_s, self.cached = flight, engine, first_s, last_s, cached


class Mixed:
    """One run."""

    def __init__(self, nodes: int, times: StepTable, *, caching: bool) -> None:
        """caching: whether nodes keep prefixes in what accelerators have free."""
        self._engines, self._caching = Engines(), caching
        model, block_tokens = self._engines.model(times), BLOCK_TOKENS if caching else 16
        self._nodes = np.array(
            [
                self._engines.add(
                    model=model,
                    kv_blocks=memory_tokens() // block_tokens,
                    block_tokens=block_tokens,
                    max_running=PLACES,
                    step_budget_tokens=STEP_TOKENS,
                    batching=PROMPTS_FIRST,
                )
                for _ in range(nodes)
            ],
            np.int32,
        )
        self._flights: dict[int, Flight] = {}
        self._answers: list[Answer] = []
        self._prompt_steps: dict[int, list[tuple[float, float]]] = {int(engine): [] for engine in self._nodes}

    def run(self, rows: Sequence[TraceRow], speed: float = 1.0) -> list[Served]:
        """Replay them, each to the node with the fewest requests, until all are served."""
        for row in rows:
            self._advance(row.arrival_s / speed)
            self._arrive(Flight(row, row.arrival_s / speed))
        self._advance(math.inf)
        stalls = {engine: _joined(steps) for engine, steps in self._prompt_steps.items()}
        return [_served(answer, stalls[answer.engine]) for answer in self._answers]

    def _arrive(self, flight: Flight) -> None:
        now_s = flight.arrival_s
        loads = self._engines.loads(self._nodes, now_s)
        engine = int(self._nodes[np.argmin(loads[:, RUNNING] + loads[:, WAITS])])
        hashes = flight.hashes if self._caching else ()
        row = self._engines.request(arrival_s=now_s, prompt=flight.prompt, output=flight.output, hashes=hashes)
        self._flights[row] = flight
        self._engines.submit(row, engine, now_s, now_s)

    def _advance(self, until_s: float) -> None:
        while not self._engines.advance(until_s):
            self._hear()
        self._hear()

    def _hear(self) -> None:
        for said in self._engines.take_said():
            if said.kind == FINISHED:
                request = self._engines.state.requests[said.request]
                first_s, last_s, cached = float(request["first_s"]), float(request["last_s"]), int(request["cached"])
                self._prompt_steps[said.engine].append((float(request["started_s"]), first_s))
                self._answers.append(Answer(self._flights.pop(said.request), said.engine, first_s, last_s, cached))
                self._engines.free(said.request)


def _joined(steps: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Stalls of a node's decodes: its steps of prompts, those without a decode step between them as one, in order of time."""
    stalls: list[tuple[float, float]] = []
    for began_s, ended_s in sorted(set(steps)):
        if stalls and began_s <= stalls[-1][1] + TOUCHING_S:
            stalls[-1] = (stalls[-1][0], max(stalls[-1][1], ended_s))
        else:
            stalls.append((began_s, ended_s))
    return stalls


def _served(answer: Answer, stalls: list[tuple[float, float]]) -> Served:
    flight = answer.flight
    first = bisect_left(stalls, (answer.first_s, 0.0))
    seen_s = []
    if first > 0 and stalls[first - 1][1] > answer.first_s + TOUCHING_S:
        # Prompts computed right after its own are in the same stall, of which it sees the rest.
        seen_s.append(stalls[first - 1][1] - answer.first_s)
    for began_s, ended_s in stalls[first:]:
        if began_s >= answer.last_s:
            break
        seen_s.append(ended_s - began_s)
    tbt_s = worst_gaps_s(answer.last_s - answer.first_s, flight.output - 1, seen_s)
    return Served(flight.prompt, answer.cached, answer.first_s - flight.arrival_s, tbt_s)
