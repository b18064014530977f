"""A trace through the simulator, with every request's own times kept, as a client would have seen them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cluster.fleet import Fleet
from cluster.record import TraceRow
from cluster.slo import RequestTiming
from simulator.flight import Flight
from simulator.result import Result
from simulator.simulation import Setup, Simulation
from simulator.world import World


class Replayed(NamedTuple):
    timings: list[RequestTiming]
    """Of completed requests, in order of their ends. Arrivals are the trace's."""
    result: Result


def replay(fleet: Fleet, rows: Sequence[TraceRow], world: World, *, control: bool = False, seed: int = 0) -> Replayed:
    """All of the rows, none of them left out as warm-up. control: whether a controller scales the fleet as it does live."""
    timings: list[RequestTiming] = []

    def ended(flight: Flight, now_s: float) -> None:
        timings.append(
            RequestTiming(arrival_s=flight.arrival_s, first_token_s=flight.first_s, last_token_s=now_s, output_tokens=flight.output)
        )

    setup = Setup(fleet=fleet, world=world, seed=seed, warm_up_s=0.0, control=control, label="replay")
    return Replayed(timings, Simulation(setup, iter(rows), ended=ended).run())
