"""Step times of named models on named accelerators: as measured where there is a profile, else scaled, else by the roofline.

The tables in `measured_tables.json` are coefficients fitted to published profiles by `benchmarks/fit_tables.py`, which states
their errors; the profiles themselves are not here.

Scaling takes the profile of the same model on the machine that is nearest, first by how many devices there are and then by the
roofline. It multiplies the prompt part by the ratio of the two rooflines' seconds per prompt token (compute), and all else by the
ratio of their decode steps (bandwidth). Watts go by TDP. Where both machines were measured it was wrong by, in the mean over
prompts of 512 to 2048 tokens, and batches of 8 to 64:

| from and to                                      | prompts     | decode      |
|--------------------------------------------------|-------------|-------------|
| A100 and H100, as many of them (Splitwise)       |  4 to 11 %  |  3 to 14 %  |
| H100 and B200 (ml.energy)                        | not known   |  8 to 29 %  |
| another number of A100s (DistServe)              |  2 to 36 %  |  3 to 35 %  |
| another number of A100s or H100s (Splitwise)     |  9 to 62 %  | 17 to 134 % |

The last are engines of 2023, whose decode steps hardly became shorter with more devices.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import msgspec

from cluster.hardware import Accelerator, accelerator
from cluster.models import model_shape
from cluster.performance import PerformanceModel, roofline
from cluster.piecewise import Knots
from cluster.step_table import AFFINE_FIT, StepTable, step_table_of

TABLES = Path(__file__).with_name("measured_tables.json")
SCHEMA = 1
USUAL_BATCH, USUAL_CONTEXT = 16, 1024  # Where two machines' decode steps are compared: weights and KV both count.


class Tables(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file."""

    schema: int
    tables: tuple[StepTable, ...]


@functools.cache
def measured_tables() -> tuple[StepTable, ...]:
    """All that were fitted to profiles, in order of model, hardware and number."""
    found = msgspec.json.decode(TABLES.read_bytes(), type=Tables)
    assert found.schema == SCHEMA, f"{TABLES} has schema {found.schema}"
    return found.tables


def table_for(shape_name: str, accelerator_name: str, tensor_parallel: int = 1) -> StepTable:
    """Of that model on so many of these accelerators. `fit.derived` says what of it was not measured.

    Raises InvalidConfig for names that are not in the catalogues, and where heads do not divide.
    """
    device = accelerator(accelerator_name)
    model = roofline(model_shape(shape_name), device, tensor_parallel)
    kin = [table for table in measured_tables() if table.fit.model == shape_name]
    for table in kin:
        if (table.fit.hardware, table.fit.tensor_parallel) == (accelerator_name, tensor_parallel):
            return table
    if kin:
        return scaled_to(min(kin, key=lambda table: _distance(table, model, tensor_parallel)), device, tensor_parallel)
    return _by_roofline(model, shape_name, accelerator_name, tensor_parallel)


def scaled_to(table: StepTable, device: Accelerator, tensor_parallel: int) -> StepTable:
    """The same model on other machines, by the ratio of the rooflines. Raises InvalidConfig where heads do not divide."""
    fit, source = table.fit, accelerator(table.fit.hardware)
    target = roofline(model_shape(fit.model), device, tensor_parallel)
    prefill, decode = _ratios(table, target)
    watts = tensor_parallel * device.tdp_w / (fit.tensor_parallel * source.tdp_w)
    told = (
        f"scaled by roofline from {fit.tensor_parallel} x {fit.hardware}: prompts x {prefill:.3g}, decode x {decode:.3g}, "
        f"watts x {watts:.3g} by TDP; its errors are those there"
    )
    return msgspec.structs.replace(
        table.stretched(prefill=prefill, decode=decode),
        idle_w=target.idle_w,
        prefill_w=table.prefill_w * watts,
        decode_w=_times(table.decode_w, watts),
        fit=msgspec.structs.replace(
            fit,
            hardware=device.name,
            tensor_parallel=tensor_parallel,
            derived=f"{told}; {fit.derived}" if fit.derived else told,
        ),
    )


def _by_roofline(model: PerformanceModel, shape: str, device: str, tensor_parallel: int) -> StepTable:
    fit = msgspec.structs.replace(
        AFFINE_FIT,
        source="data sheets and the roofline of cluster/performance.py, whose errors stand there",
        hardware=device,
        model=shape,
        tensor_parallel=tensor_parallel,
        derived="not measured: roofline",
    )
    return step_table_of(model, fit=fit)


def _ratios(table: StepTable, target: PerformanceModel) -> tuple[float, float]:
    """How many times as long prompts and decode steps last there."""
    source = roofline(model_shape(table.fit.model), accelerator(table.fit.hardware), table.fit.tensor_parallel)
    kv_tokens = USUAL_BATCH * USUAL_CONTEXT
    decode = target.decode_step_s(USUAL_BATCH, kv_tokens) / source.decode_step_s(USUAL_BATCH, kv_tokens)
    return target.prefill_token_s / source.prefill_token_s, decode


def _distance(table: StepTable, target: PerformanceModel, tensor_parallel: int) -> tuple[float, float]:
    """Of two machines, the nearest least: how unlike their numbers are, and then how far their ratios are from 1."""
    prefill, decode = _ratios(table, target)
    return abs(math.log(tensor_parallel / table.fit.tensor_parallel)), abs(math.log(prefill)) + abs(math.log(decode))


def _times(knots: Knots, factor: float) -> Knots:
    return tuple((place, value * factor) for place, value in knots)
