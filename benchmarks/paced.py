"""What one more paced replica adds on this machine: `python -m benchmarks.paced [--json]`.

Replicas of the torch engine in a process each, decoding a batch of BATCH paced as PACE says. Capacity is all their tokens/s over
those of one. A step's length is the mean over the emulated one; a step overruns that takes longer by itself. With more replicas
than the machine can carry, the overruns say so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.engine import CONFIG, CONTEXT, Engine
from benchmarks.random_model import save_random
from cluster.fleet import Pace
from workers.build_engine import performance_of

PACE = Pace(shape="llama-3.1-70b", accelerator="a100-80g", tensor_parallel=4)
BATCH = 4
STEPS = 200
REPLICAS = (1, 2, 3)


class Paced(NamedTuple):
    tokens_s: float
    """Of all replicas."""
    step_length: float
    overrun_share: float


def replica(path: Path, parent: Connection) -> None:
    """One process: says that it is ready, decodes at a word, tells seconds, emulated seconds and overruns."""
    engine = Engine(path, pace=performance_of(PACE))
    engine.decode_s([CONTEXT] * BATCH)
    for i in range(BATCH):
        engine.submit(f"p{i}", CONTEXT, STEPS + 1)
    engine.step()
    overruns = engine.engine.load().overrun_steps
    parent.send("ready")
    parent.recv()
    began_s = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    lasted_s = time.perf_counter() - began_s
    emulated_s = engine.engine.performance.decode_span_s(BATCH, BATCH * (CONTEXT + 1), STEPS)
    parent.send((lasted_s, emulated_s, engine.engine.load().overrun_steps - overruns))


def measure(path: Path, replicas: int) -> Paced:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(replicas):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=replica, args=(path, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # Else one that dies at its start would leave us waiting for its word.
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send("go")
    told = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return Paced(
        tokens_s=sum(BATCH * STEPS / lasted_s for lasted_s, _, _ in told),
        step_length=statistics.fmean(lasted_s / emulated_s for lasted_s, emulated_s, _ in told),
        overrun_share=sum(overruns for _, _, overruns in told) / (replicas * STEPS),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = save_random(CONFIG, Path(folder))
        rows = {replicas: measure(path, replicas) for replicas in REPLICAS}
    _print(rows)
    if arguments.json:
        figures = {f"capacity_{replicas}": round(row.tokens_s / rows[1].tokens_s, 3) for replicas, row in rows.items()}
        for replicas, row in rows.items():
            figures |= {f"step_length_{replicas}": round(row.step_length, 3), f"overrun_share_{replicas}": row.overrun_share}
        print(json.dumps(figures))


def _print(rows: dict[int, Paced]) -> None:
    table = Table(title=f"paced as {PACE.shape} on {PACE.tensor_parallel} {PACE.accelerator}, batch {BATCH} each")
    for column in ("replicas", "tokens/s", "of one", "step over emulated", "overruns"):
        table.add_column(column, justify="right")
    for replicas, row in rows.items():
        of_one = f"{row.tokens_s / rows[1].tokens_s:.2f}"
        table.add_row(f"{replicas}", f"{row.tokens_s:,.0f}", of_one, f"{row.step_length:.3f}", f"{row.overrun_share:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
