"""Finds what a simulated fleet must be told so that one recorded trace comes out as it did live: step times in place, and delays.

Step times measured on an engine alone miss what surrounds it in a fleet: its worker's loop shares a thread's lock with it, each
step's tokens are packed and sent, gateway and client run on the same cores. So the table measured alone keeps its shape, and
factors on its parts, with the delays of the `World`, are fitted: least squares over quantiles of TTFT and TPOT in each stage of
calibration traces, live against simulated. Nothing else may be fitted, and nothing on the traces that are judged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, least_squares, minimize

from benchmarks.simulated_replay import replay
from cluster.errors import InvalidTrace
from cluster.fleet import Fleet
from cluster.record import TraceRow
from cluster.slo import RequestTiming
from cluster.step_table import StepTable, write_table
from simulator.world import World

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
MOST_FACTOR = 8.0
"""A parameter stays within so many times, and one over so many times, what it was before."""
DIFFERENCE = 0.04
"""By how much a parameter is moved to see what it does: batches change with it in jumps, which smaller moves would follow."""
MOST_TRIES = 15
NEAR = {"maxfev": 200, "xatol": 1e-3, "fatol": 1e-4}
NEARBY = 0.15  # Of a parameter, where looking around the best place begins.
LEAST_S = 1e-4
"""Of a quantile: tokens that a busy machine hands over all at once have no time between them."""
SOFT = 0.1
"""Relative errors above it count by their size, not its square: a quantile of few requests may be off by chance."""


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """Factors on the measured table's parts, and delays."""

    step: float = 1.0
    """On the part of every step."""
    prefill: float = 1.0
    """On what prompt tokens and their pairs add."""
    decode: float = 1.0
    """On what decoding sequences and their KV add."""
    hop_s: float = World().hop_s
    transfer_setup_s: float = World().transfer_setup_s

    def table(self, measured: StepTable) -> StepTable:
        stretched = measured.stretched(prefill=self.prefill, decode=self.decode)
        return msgspec.structs.replace(stretched, step_s=measured.step_s * self.step)

    def world(self, tables: Mapping[str, StepTable], base: World, folder: Path) -> World:
        """`base` with these delays and tables; the tables are written into the folder."""
        paths = {}
        for number, (group, measured) in enumerate(tables.items()):
            paths[group] = str(folder / f"{number}.json")
            write_table(paths[group], self.table(measured))
        return msgspec.structs.replace(base, tables=paths, hop_s=self.hop_s, transfer_setup_s=self.transfer_setup_s)


class Seen(NamedTuple):
    """A calibration trace and what came of it live."""

    rows: Sequence[TraceRow]
    timings: Sequence[RequestTiming]
    ends_s: Sequence[float]
    """Where its stages end."""


def fitted(
    names: Sequence[str], fleet: Fleet, tables: Mapping[str, StepTable], base: World, seen: Sequence[Seen]
) -> tuple[Fitted, float]:
    """The named parameters fitted, the others as they are by default; and the mean relative error that is left on what was seen.

    tables: by group, as measured. Raises InvalidTrace where a stage has no answers.
    """
    live = [stages((one for one in each.timings if one.completed), each.ends_s) for each in seen]
    wanted = np.log(np.concatenate(live))
    with tempfile.TemporaryDirectory() as folder:

        def misses(logs: NDArray[np.float64]) -> NDArray[np.float64]:
            world = _of(names, logs).world(tables, base, Path(folder))
            there = [stages(replay(fleet, each.rows, world).timings, each.ends_s) for each in seen]
            return np.log(np.concatenate(there)) - wanted

        start = np.log([getattr(Fitted(), name) for name in names])
        bounds = (start - np.log(MOST_FACTOR), start + np.log(MOST_FACTOR))
        best = least_squares(misses, start, bounds=bounds, diff_step=DIFFERENCE, loss="soft_l1", f_scale=SOFT, max_nfev=MOST_TRIES)
        # Differences of a simulation are rough near the best place: from there on only values are compared.
        corners = np.clip(np.vstack((best.x, best.x + NEARBY * np.eye(len(names)))), *bounds)
        options = {**NEAR, "initial_simplex": corners}
        near = minimize(lambda logs: _cost(misses(logs)), best.x, method="Nelder-Mead", bounds=Bounds(*bounds), options=options)
        left = float(np.mean(np.abs(np.expm1(misses(near.x)))))
    return _of(names, near.x), left


def stages(timings: Iterable[RequestTiming], ends_s: Sequence[float]) -> NDArray[np.float64]:
    """Quantiles of TTFT, then of TPOT, of what arrived in each stage: one array."""
    timings, start_s = list(timings), 0.0
    found: list[NDArray[np.float64]] = []
    for end_s in ends_s:
        part = [one for one in timings if start_s <= one.arrival_s < end_s]
        for values in ([one.ttft_s for one in part], [one.tpot_s for one in part]):
            known = [value for value in values if value is not None]
            if not known:
                raise InvalidTrace(f"no answer of two tokens to what arrived from {start_s:g} s to {end_s:g} s: nothing to fit to")
            found.append(np.maximum(np.quantile(known, QUANTILES), LEAST_S))
        start_s = end_s
    return np.concatenate(found)


def _cost(misses: NDArray[np.float64]) -> float:
    return float(np.sum(np.sqrt(1.0 + (misses / SOFT) ** 2) - 1.0))


def _of(names: Sequence[str], logs: Iterable[float]) -> Fitted:
    return Fitted(**{name: float(np.exp(log)) for name, log in zip(names, logs, strict=True)})
