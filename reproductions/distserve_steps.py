"""Step times and KV room of OPT on A100-80G, from the constants that DistServe's artifact fitted to its own profiles and to vLLM's.

DistServe (OSDI'24), appendix A and `simdistserve`'s profiler data: milliseconds of a prompt step a + b sum(l) + c sum(l^2), of a
decode step a + b sum(context) + c batch in two regimes of the batch. A step table has one slope for contexts, that of small
batches here: at 128 sequences of 600 tokens it makes OPT-13B's step 10 % longer than the constants of large batches do. Where
those would have a step become shorter with one sequence more, it stays as long.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from cluster.piecewise import Knots
from cluster.step_table import Fit, StepTable

System = Literal["distserve", "vllm"]
OPT_CONTEXT = 2048
"""Tokens of prompt and answer together, at most."""


class Regimes(msgspec.Struct, frozen=True):
    """The constants of one model at one tensor parallelism, as the artifact has them. Milliseconds."""

    decoding_large_small_bs_threshold: int
    prefill: tuple[float, float, float]
    decoding_smallbs: tuple[float, float, float]
    decoding_largebs: tuple[float, float, float]


def degrees(data_dir: Path, model: str, system: System = "distserve") -> list[int]:
    """Of tensor parallelism, for which there are constants."""
    return sorted(_constants(data_dir, model, system))


def step_table(data_dir: Path, model: str, tensor_parallel: int, system: System, prefill_cost: float = 1.0) -> StepTable:
    """model: `opt-13b` or `opt-66b`."""
    found = _constants(data_dir, model, system)[tensor_parallel]
    fixed, token, square = found.prefill
    step = min(fixed, found.decoding_smallbs[0])
    # A prompt of l tokens has l (l + 1) / 2 pairs: c l^2 is 2 c a pair, less c a token.
    first, slope = fixed - step + token - square, token - square
    table = StepTable(
        step_s=step / 1e3,
        prefill=((0.0, 0.0), (1.0, first / 1e3), (2.0, (first + slope) / 1e3)),
        prefill_pair_s=2 * square / 1e3,
        decode=_decode_knots(found, step),
        kv=((0.0, 0.0), (1.0, found.decoding_smallbs[1] / 1e3)),
        fit=Fit(
            source=f"constants of DistServe's artifact for {system} (OSDI'24)",
            points=0,
            mean_error=0.0,
            largest_error=0.0,
            prefill_tokens=(1.0, OPT_CONTEXT),
            sequences=(1.0, 256.0),
            kv_tokens=(1.0, 256.0 * OPT_CONTEXT),
            hardware="a100-80g",
            model=model,
            tensor_parallel=tensor_parallel,
        ),
    )
    return table.stretched(prefill=prefill_cost, decode=1.0)


def kv_room(data_dir: Path, model: str, tensor_parallel: int, pipeline: int) -> int | None:
    """Tokens whose KV fits beside the weights, as the artifact measured; None where it did not or they do not fit."""
    with (data_dir / "distserve_sim/max_num_tokens.csv").open() as lines:
        for row in csv.DictReader(lines):
            if (row["model"], int(row["tp"]), int(row["pp"])) == (f"facebook/{model}", tensor_parallel, pipeline):
                return int(row["max_num_tokens"])
    return None


def _decode_knots(found: Regimes, step: float) -> Knots:
    """Seconds beyond `step` milliseconds, over batches."""
    edge = found.decoding_large_small_bs_threshold
    (small, _, each), (large, _, each_large) = found.decoding_smallbs, found.decoding_largebs
    top = small + each * edge
    turn = max(edge + 1.0, (top - large) / each_large)  # Where the constants of large batches are the longer ones.
    places = ((0.0, step), (1.0, small + each), (float(edge), top), (turn, large + each_large * turn))
    beyond = (turn + 1.0, large + each_large * (turn + 1.0))
    seconds = np.maximum.accumulate([(value - step) / 1e3 for _, value in (*places, beyond)])
    return tuple((place, float(value)) for (place, _), value in zip((*places, beyond), seconds, strict=True))


def _constants(data_dir: Path, model: str, system: System) -> dict[int, Regimes]:
    raw = json.loads((data_dir / f"distserve_sim/profiler-a100-80g.{system}.json").read_text())
    return msgspec.convert(raw[f"facebook/{model}"], dict[int, Regimes], strict=False)
