"""Fits step tables to the published profiles and writes them into the package: `cluster/measured_tables.json`.

The profiles stay where they are; only coefficients are kept. A test fits them again and finds the file as it is. Run after a
change of the fit: python -m benchmarks.fit_tables [DATA], by default $MOBULA_DATA.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from benchmarks.profiles import DISTSERVE, ML_ENERGY, SPLITWISE, Profile, contexts_vary, distserve, ml_energy, splitwise
from cluster.hardware import accelerator
from cluster.measured import SCHEMA, TABLES, Tables
from cluster.models import model_shape
from cluster.performance import PerformanceModel, roofline
from cluster.step_table import Fit, StepTable, step_table_of
from cluster.table_fitting import Given, fit_table, watts_by_batch

DIGITS = 6  # Far below what a measurement tells, and the same on every machine.
ML_ENERGY_SHAPES = {
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B-Instruct": "llama-3.1-70b",
    "meta-llama/Llama-3.3-70B-Instruct": "llama-3.1-70b",
    "meta-llama/Llama-3.1-405B-Instruct": "llama-3.1-405b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-14B": "qwen3-14b",
    "Qwen/Qwen3-32B": "qwen3-32b",
}
OPT_KV_KNOTS = 4  # Constants of the two regimes differ in the cost of a KV token, too.


def tables(data: Path) -> list[StepTable]:
    """All that can be fitted, in order of shape, device and number. Raises OSError without the profiles."""
    found = [*_splitwise(data), *_distserve(data), *_ml_energy(data)]
    return sorted((rounded(table) for table in found), key=lambda t: (t.fit.model, t.fit.hardware, t.fit.tensor_parallel))


def rounded(table: StepTable) -> StepTable:
    """To so many significant digits."""

    def shorter(value: object) -> object:
        match value:
            case float():
                return float(f"{value:.{DIGITS}g}")
            case list():
                return [shorter(each) for each in value]
            case dict():
                return {key: shorter(each) for key, each in value.items()}
        return value

    return msgspec.convert(shorter(msgspec.to_builtins(table)), StepTable)


def _splitwise(data: Path) -> Iterator[StepTable]:
    for profile in splitwise(data):
        model = _roofline(profile)
        # Its prompts were all computed whole, some of them several at once, and their time follows the tokens of a step.
        if profile.prefill_w:
            watts = statistics.median(watt for _, watt in profile.decode_w)
            given = Given(
                idle_w=model.idle_w,
                prefill_w=statistics.median(profile.prefill_w),
                decode_w=((0.0, watts), (1.0, watts)),
            )
            derived = ""
        else:
            given, derived = _roofline_watts(model), "watts: shares of TDP of the roofline, not measured there"
        source = f"Splitwise (ISCA'24), {SPLITWISE}: one to 64 prompts of 512 tokens, one of 128 to 8192"
        yield fit_table(profile.points, fit=_fit(profile, source, derived), given=given)


def _distserve(data: Path) -> Iterator[StepTable]:
    for profile in distserve(data):
        model = _roofline(profile)
        derived = "watts: shares of TDP of the roofline, not measured there"
        source = f"DistServe (OSDI'24), {DISTSERVE}: values of its fitted constants, both regimes of batch size"
        yield fit_table(profile.points, fit=_fit(profile, source, derived), given=_roofline_watts(model), kv_knots=OPT_KV_KNOTS)


def _ml_energy(data: Path) -> Iterator[StepTable]:
    for profile in ml_energy(data, ML_ENERGY_SHAPES):
        model = _roofline(profile)
        given = Given(
            prefill=((0.0, 0.0), (1.0, model.prefill_token_s)),
            prefill_pair_s=model.prefill_pair_s,
            kv_token_s=None if contexts_vary(profile.points) else model.kv_token_s,
            idle_w=model.idle_w,
            prefill_w=model.prefill_w,
            decode_w=watts_by_batch(profile.decode_w),
        )
        kv = "" if given.kv_token_s is None else " and KV tokens"
        derived = f"prompts{kv}: roofline; idle and prompt watts: shares of TDP of the roofline"
        source = f"ml.energy, vLLM of 2025, {ML_ENERGY}: median time between tokens"
        yield fit_table(profile.points, fit=_fit(profile, source, derived), given=given)


def _roofline(profile: Profile) -> PerformanceModel:
    return roofline(model_shape(profile.shape), accelerator(profile.device), profile.devices)


def _roofline_watts(model: PerformanceModel) -> Given:
    return Given(idle_w=model.idle_w, prefill_w=model.prefill_w, decode_w=step_table_of(model).decode_w)


def _fit(profile: Profile, source: str, derived: str) -> Fit:
    return Fit(
        source=source,
        points=0,
        mean_error=0.0,
        largest_error=0.0,
        prefill_tokens=(0.0, 0.0),
        sequences=(0.0, 0.0),
        kv_tokens=(0.0, 0.0),
        hardware=profile.device,
        model=profile.shape,
        tensor_parallel=profile.devices,
        derived=derived,
    )


def encoded(found: list[StepTable]) -> bytes:
    """The file's content: one table a line."""
    lines = b",\n".join(msgspec.json.encode(table) for table in found)
    content = b'{"schema": %d, "tables": [\n%s\n]}\n' % (SCHEMA, lines)
    msgspec.json.decode(content, type=Tables)
    return content


def report(found: list[StepTable]) -> str:
    """A table in Markdown of what was fitted and how well."""
    lines = [
        "| model | on | points | mean error | largest | held out: points | mean | largest | affine: mean | largest |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for table in found:
        fit, (mean, largest) = table.fit, table.affine_error()
        held = [fit.held_out_mean_error or 0.0, fit.held_out_largest_error or 0.0]
        shown = [f"{error:.1%}" for error in (fit.mean_error, fit.largest_error)]
        shown += [str(fit.held_out_points), *(f"{error:.1%}" for error in (*held, mean, largest))]
        lines.append(f"| {fit.model} | {fit.tensor_parallel} x {fit.hardware} | {fit.points} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    data = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MOBULA_DATA")
    if not data:
        sys.exit("where are the profiles? give their directory, or set MOBULA_DATA")
    found = tables(Path(data))
    TABLES.write_bytes(encoded(found))
    print(report(found))
    print(f"{len(found)} tables in {TABLES}")


if __name__ == "__main__":
    main()
