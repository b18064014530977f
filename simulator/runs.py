"""Cases carried out: one after the other in this process, or as Ray tasks on whatever cluster this process has joined.

A case whose error is its own does not end the others; it comes back as that error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.errors import InvalidConfig, MobulaError, Unreachable
from simulator.case import Case, run
from simulator.digest import code_version
from simulator.outcome import Outcome
from simulator.store import Store

Ended = tuple[str, Outcome | MobulaError]
"""Key of a case, and what came of it."""
Runner = Callable[[Mapping[str, Case]], Iterator[Ended]]
"""Carries out cases by their keys, in any order."""

PENDING_PER_CPU = 2  # Tasks that wait at Ray: enough that no core idles, few enough that an interrupt loses little.


def remaining(cases: Mapping[str, Case], store: Store) -> dict[str, Case]:
    """Those that nobody has run."""
    return {key: case for key, case in cases.items() if store.get(key) is None}


def in_turn(cases: Mapping[str, Case]) -> Iterator[Ended]:
    """In this process."""
    for key, case in cases.items():
        try:
            yield key, run(case)
        except MobulaError as error:
            yield key, error


def on_ray(cases: Mapping[str, Case]) -> Iterator[Ended]:
    """On the Ray cluster that this process has joined, a core for each. Files that cases read must be at the same paths there."""
    import ray

    task = ray.remote(num_cpus=1, runtime_env={"env_vars": _environment()})(_run_there)
    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    left, under_way = iter(cases.items()), {}
    for key, case in _first(left, cores * PENDING_PER_CPU):
        under_way[task.remote(case, code_version())] = key
    while under_way:
        (done, *_), _ = ray.wait(list(under_way), num_returns=1)
        yield under_way.pop(done), _answer(done)
        for key, case in _first(left, 1):
            under_way[task.remote(case, code_version())] = key


def _run_there(case: Case, version: str) -> Outcome:
    if code_version() != version:
        raise InvalidConfig(
            f"code {code_version()} on {os.uname().nodename} is not {version}, that of this command: install the same"
        )
    return run(case)


def _answer(done: Any) -> Outcome | MobulaError:
    import ray

    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MobulaError):
            return error.cause
        raise
    except ray.exceptions.RayError as error:
        return Unreachable(f"the process that ran it was lost: {' '.join(str(error).split())}")


def _first(left: Iterator[tuple[str, Case]], count: int) -> Iterable[tuple[str, Case]]:
    return [item for _, item in zip(range(count), left, strict=False)]


def _environment() -> dict[str, str]:
    """Our packages come from where this process has them."""
    root = str(Path(__file__).parents[1])
    return {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]), "OMP_NUM_THREADS": "1"}
