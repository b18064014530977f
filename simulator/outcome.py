"""What one run comes to, in the few numbers that runs are compared by, and what those numbers are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.slo import Slo
from simulator.result import Result
from simulator.sketch import quantiles_s, share_within
from simulator.steps import records

if TYPE_CHECKING:
    from simulator.simulation import Simulation


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Of one run. As in `Result`, over all SLO classes together."""

    arrived: int
    completed: int
    kept: int
    attainment: float
    goodput_rps: float
    ttft_p90_s: float | None
    tpot_p90_s: float | None
    usd: float
    usd_per_million_output_tokens: float | None
    kwh: float
    replica_hours: float
    outside: int
    """Requests that ended outside their SLO, or were turned away."""
    missed: Mapping[str, int]
    """Requests by the bound that they missed, `TTFT`, `TPOT` or `E2E`, and those turned away, `queue`. One may be under several."""
    stopped: bool = False
    """The run ended before its traffic did: so many had missed their SLO by then."""
    cpu_s: float = 0.0

    @property
    def binding(self) -> str | None:
        """What most were missed by; None where nothing was."""
        most = max(self.missed, key=lambda name: self.missed[name], default=None)
        return most if most is not None and self.missed[most] else None


class Metric(NamedTuple):
    """A number by which runs are compared."""

    field: str
    words: str
    unit: str
    heading: str
    """Of a narrow column."""
    scale: float
    """From the field's unit to `unit`."""
    more_is_better: bool


METRICS = (
    Metric("attainment", "attainment", "points", "within %", 100.0, True),
    Metric("goodput_rps", "goodput", "requests/s", "good req/s", 1.0, True),
    Metric("ttft_p90_s", "P90 TTFT", "ms", "TTFT ms", 1e3, False),
    Metric("tpot_p90_s", "P90 TPOT", "ms", "TPOT ms", 1e3, False),
    Metric("usd_per_million_output_tokens", "cost", "USD per million output tokens", "USD/M tok", 1.0, False),
    Metric("kwh", "energy", "kWh", "kWh", 1.0, False),
    Metric("replica_hours", "replica-hours", "h", "replica h", 1.0, False),
)


def outcome_of(simulation: Simulation, result: Result, *, stopped: bool) -> Outcome:
    sketches = simulation.engines.state.sketches
    return Outcome(
        arrived=result.arrived,
        completed=result.completed,
        kept=result.kept,
        attainment=result.attainment,
        goodput_rps=result.goodput_rps,
        ttft_p90_s=_p90_s(sketches[:, records.TTFT].sum(axis=0)),
        tpot_p90_s=_p90_s(sketches[:, records.TPOT].sum(axis=0)),
        usd=result.usd,
        usd_per_million_output_tokens=result.usd_per_million_output_tokens,
        kwh=result.kwh,
        replica_hours=result.replica_hours,
        outside=simulation.missed,
        missed=_missed(sketches, list(simulation.slos.values()), sum(result.rejected.values())),
        stopped=stopped,
        cpu_s=result.cpu_s,
    )


def _p90_s(counts: NDArray[np.int64]) -> float | None:
    found = quantiles_s(counts, (0.9,))
    return found[0] if found else None


def _missed(sketches: NDArray[np.int64], slos: Sequence[Slo], rejected: int) -> dict[str, int]:
    """sketches: by class, kind and bucket."""
    missed = {"TTFT": 0, "TPOT": 0, "E2E": 0, "queue": rejected}
    for counts, slo in zip(sketches, slos, strict=True):
        bounds = ((records.TTFT, slo.ttft_s, "TTFT"), (records.TPOT, slo.tpot_s, "TPOT"), (records.E2E, slo.e2e_s, "E2E"))
        for kind, bound_s, name in bounds:
            within = None if bound_s is None else share_within(counts[kind], bound_s)
            if within is not None:
                missed[name] += round((1.0 - within) * int(counts[kind].sum()))
    return missed
