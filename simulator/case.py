"""One run of a comparison or a search: what is simulated, as one value; what comes of it is an `Outcome`.

A case is whole: whoever has it, here or on another machine, gets the same outcome from the same code and the same files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet
from cluster.slo import Slo
from simulator.faults import check_faults
from simulator.machines import check_slo, machines_of
from simulator.outcome import Outcome, outcome_of
from simulator.simulation import Setup, Simulation
from simulator.world import World
from workloads.reshape import Scale
from workloads.stream import Workload, open_workload

Factor = Annotated[float, msgspec.Meta(gt=0)]
Tokens = Annotated[int, msgspec.Meta(ge=1)]
Minutes = Annotated[float, msgspec.Meta(ge=0)]


class Traffic(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What arrives."""

    trace: str
    """A file, or a generator as `mobula replay` takes it."""
    start: Minutes = 0.0
    """Minutes of the trace to skip."""
    minutes: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Minutes of it to play; None plays all."""
    rate: Factor = 1.0
    """2 lets it arrive twice as fast, in half the time."""
    prompt: Factor = 1.0
    output: Factor = 1.0
    """Factors on lengths."""
    max_prompt_tokens: Tokens | None = None
    max_output_tokens: Tokens | None = None

    def open(self, seed: int) -> Workload:
        """Its rows. seed: of a generator. Raises InvalidConfig or InvalidTrace."""
        scale = Scale(
            prompt=self.prompt,
            output=self.output,
            rate=self.rate,
            max_prompt_tokens=self.max_prompt_tokens,
            max_output_tokens=self.max_output_tokens,
        )
        span_s = None if self.minutes is None else 60 * self.minutes
        return open_workload(self.trace, seed=seed, start_s=60 * self.start, span_s=span_s, scale=scale)

    def part(self, start_s: float, span_s: float) -> Traffic:
        """Those of its requests that arrive within so many seconds of its own, scaled time."""
        minutes = span_s * self.rate / 60
        return msgspec.structs.replace(self, start=self.start + start_s * self.rate / 60, minutes=minutes)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated."""

    fleet: Fleet
    world: World = World()
    traffic: Traffic
    seed: int = 0
    warm_up_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    """Requests that arrive before it do not count."""
    control: bool = True
    """False: the fleet stays as it is."""
    may_miss: int | None = None
    """The run is stopped once more requests than that have missed their SLO; None runs it to its end."""


class _Stop(Exception):
    """Enough is known."""


def check_case(case: Case) -> None:
    """Raise InvalidConfig or InvalidTrace for what could not be simulated, before anything is."""
    machines = machines_of(case.fleet, case.world)
    for name, slo in (case.fleet.slo or {"default": Slo()}).items():
        check_slo(name, slo, machines)
    check_faults(case.fleet, case.world)
    case.traffic.open(case.seed)


def run(case: Case, progress: Callable[[float], None] = lambda share: None) -> Outcome:
    """Simulate it. progress: told of the share of its traffic that has arrived.

    Raises KeyboardInterrupt where that ended it, InvalidConfig where no request counts.
    """
    workload = case.traffic.open(case.seed)

    def watch(now_s: float, arrived: int) -> None:
        progress(workload.progress)
        if case.may_miss is not None and simulation.missed > case.may_miss:
            raise _Stop

    setup = Setup(
        fleet=case.fleet,
        world=case.world,
        seed=case.seed,
        warm_up_s=case.warm_up_s,
        control=case.control,
        label=workload.words,
    )
    simulation = Simulation(setup, iter(workload), progress=watch)
    try:
        result = simulation.run()
    except _Stop:
        return outcome_of(simulation, simulation.result(), stopped=True)
    if result.interrupted:
        raise KeyboardInterrupt
    if not result.arrived:
        raise InvalidConfig(f"warm-up {case.warm_up_s:g} s: no request arrives after it in {workload.words}")
    return outcome_of(simulation, result, stopped=False)
