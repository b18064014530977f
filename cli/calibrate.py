"""`mobula calibrate`: an engine's step times, measured and fitted, as a file that `cluster.step_table` reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.fleet import ModelSpec, ReplicaGroup
    from cluster.step_table import StepTable
    from cluster.table_fitting import Measured
    from workers.engines.engine import Engine

KV_KNOTS = 3  # Attention over little KV hides in a step's fixed part, and then shows: two bends are enough for that.


def calibrate(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="Where to write the table, as JSON.")],
    file: Annotated[Path, typer.Option("--file", "-f", help="A cluster.yaml.")] = Path("cluster.yaml"),
    group: Annotated[str, typer.Option(metavar="GROUP", help="MODEL/ROLE/POOL, or a role where only one group has it.")] = "decode",
    rounds: Annotated[int, typer.Option(metavar="N", help="Each step is tried so often, and the quickest taken.", min=1)] = 3,
    max_prompt: Annotated[int | None, typer.Option(metavar="N", help="Longest prompt; by default what fits.", min=32)] = None,
    max_batch: Annotated[int | None, typer.Option(metavar="N", help="Largest batch; by default max_running.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="What was measured and fitted, as one JSON object.")] = False,
) -> None:
    """Measure a replica's step times and write them as a table.

    The engine of one group is made in this process, alone, and stopped at the end; no fleet need be up. A torch engine without
    a pace is measured as fast as this machine runs it, so let nothing else run beside it. A paced one is measured as it paces. An
    emulated one is stepped in its own time: that takes seconds, and gives its model back. A fleet that is up is not measured:
    its steps are of mixed work that no request log tells apart.

    Tried are prompts, whole and behind cached prefixes, and decoding batches at several contexts; steps of both together are
    taken to last the sum of their parts. Watts are not measured: they are those that the engine states. Each measurement inside
    the domain is also predicted by a fit to all others, which gives the held-out error.

    Examples:

    mobula calibrate cpu.json -f cluster.yaml --group decode

    mobula calibrate cpu.json --group tiny-dense/mixed/default --rounds 5 --max-prompt 512 --max-batch 8
    """
    from rich.console import Console

    from cli.groups import named_group
    from cli.patience import patience
    from cluster.step_table import write_table
    from controller.config import load_fleet

    if not table.absolute().parent.is_dir():
        raise InvalidConfig(f"{table}: there is no directory {table.absolute().parent}")
    fleet = load_fleet(file)
    name, spec = named_group(fleet, group)
    served = next(model for model in fleet.models if not spec.model or model.name == spec.model)
    with patience(f"measuring {name}") as told:
        points, engine = measured(spec, served, rounds, max_prompt, max_batch, told)
    fitted = fitted_table(points, engine, name, spec, served)
    write_table(table, fitted)
    if as_json:
        typer.echo(_as_json(table, fitted, points))
    else:
        _print(Console(), table, fitted, points)


def measured(
    spec: ReplicaGroup,
    model: ModelSpec,
    rounds: int,
    max_prompt: int | None,
    max_batch: int | None,
    told: Callable[[int, int], None],
) -> tuple[list[Measured], Engine]:
    """The group's engine, started, measured and stopped. Raises InvalidModel, InvalidConfig or Unreachable."""
    import time

    from workers.build_engine import build_engine
    from workers.calibration import RealWatch, VirtualWatch, design, measure
    from workers.engines.step_driver import ManualDriver

    driver = ManualDriver() if spec.engine == "emulated" else None
    watch = RealWatch(time.perf_counter) if driver is None else VirtualWatch(driver)
    engine = build_engine(spec, model, driver)
    engine.start(watch)
    try:
        engine.warm()
        plan = design(engine.limits, max_prompt=max_prompt, max_batch=max_batch)
        # An emulated engine's rounds are all alike.
        return measure(engine, watch, plan, rounds=rounds if driver is None else 1, told=told), engine
    finally:
        engine.stop()


def fitted_table(points: list[Measured], engine: Engine, name: str, spec: ReplicaGroup, model: ModelSpec) -> StepTable:
    """Of what was measured, with the watts that the engine states."""
    from cluster.step_table import Fit, step_table_of
    from cluster.table_fitting import Given, fit_table

    stated, pace = engine.performance, spec.pace
    source = f"mobula calibrate: {spec.engine} engine of {name}, {spec.threads} threads, {spec.dtype} on {spec.device}"
    fit = Fit(
        source=source
        if pace is None
        else f"mobula calibrate: {spec.engine} engine of {name}, paced {pace.speedup:g} times as fast",
        points=0,
        mean_error=0.0,
        largest_error=0.0,
        prefill_tokens=(0.0, 0.0),
        sequences=(0.0, 0.0),
        kv_tokens=(0.0, 0.0),
        hardware=spec.device if pace is None else pace.accelerator,
        model=model.name if pace is None else pace.shape,
        tensor_parallel=1 if pace is None else pace.tensor_parallel,
        derived="watts: those that the engine states, not measured; mixed steps: the sum of their parts",
    )
    watts = Given(idle_w=stated.idle_w, prefill_w=stated.prefill_w, decode_w=step_table_of(stated).decode_w)
    return fit_table(points, fit=fit, given=watts, kv_knots=KV_KNOTS)


def rows(table: StepTable, points: list[Measured]) -> list[dict[str, Any]]:
    """Each point with what the table says of it, prompts first."""
    from cluster.table_fitting import relative_error, seconds_of

    return [
        {
            "steps": len(point.steps),
            "prefill_tokens": sum(step.prefill_tokens for step in point.steps),
            "prefill_pairs": sum(step.prefill_pairs for step in point.steps),
            "sequences": max(step.sequences for step in point.steps),
            "kv_tokens": max(step.kv_tokens for step in point.steps),
            "measured_s": point.seconds,
            "fitted_s": seconds_of(table, point.steps),
            "error": relative_error(table, point),
        }
        for point in points
    ]


def _as_json(path: Path, table: StepTable, points: list[Measured]) -> bytes:
    import msgspec

    mean, largest = table.affine_error()
    nearest = {"model": table.affine(), "mean_error": mean, "largest_error": largest}
    return msgspec.json.encode({"table": str(path), "fit": table.fit, "affine": nearest, "points": rows(table, points)})


def _print(console: Any, path: Path, table: StepTable, points: list[Measured]) -> None:
    from rich import box
    from rich.table import Table

    from cli.figures import figure

    shown = Table(box=box.SIMPLE)
    for heading in ("prompt", "steps", "pairs", "batch", "KV", "measured ms", "fitted ms", "error"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows(table, points):
        counts = [f"{row[name]:,.0f}" for name in ("prefill_tokens", "steps", "prefill_pairs", "sequences", "kv_tokens")]
        times = [figure(1e3 * row[name]) for name in ("measured_s", "fitted_s")]
        shown.add_row(*counts, *times, f"{row['error']:.1%}")
    console.print(shown)
    fit, (mean, largest) = table.fit, table.affine_error()
    console.print(f"fitted to {fit.points} measurements: mean error {fit.mean_error:.1%}, largest {fit.largest_error:.1%}")
    if fit.held_out_points:
        held = f"mean error {fit.held_out_mean_error:.1%}, largest {fit.held_out_largest_error:.1%}"
        console.print(f"held out, {fit.held_out_points} of them in turn: {held}")
    console.print(f"the nearest affine model, as routers believe: mean error {mean:.1%}, largest {largest:.1%}")
    console.print(f"written: {path}", markup=False, soft_wrap=True)
