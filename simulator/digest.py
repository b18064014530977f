"""What a run's outcome depends on, as one short text: equal keys mean equal outcomes, so that none is run twice.

It covers the case, the contents of the files it reads, our own code, and the modules of policies that the operator wrote. It does
not cover the versions of Python, numba and numpy.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from cluster.errors import InvalidConfig
from simulator.case import Case
from workloads.generators import is_generator

PACKAGES = ("cluster", "controller", "gateway", "policies", "simulator", "workers", "workloads")
"""All that a simulation imports of ours."""
SUFFIXES = (".py", ".json")
KEY_BYTES = 16  # A chance of 1e-26 that two of a million runs have one key.
_LENGTHS = re.compile(r"\blengths=([^,]+)")


def key_of(case: Case) -> str:
    """Of a case as it would run now. Raises InvalidConfig for a file that cannot be read."""
    digest = hashlib.blake2b(msgspec.json.encode(case, order="deterministic"), digest_size=KEY_BYTES)
    digest.update(code_version().encode())
    for path in sorted(_files_of(case)):
        digest.update(_content(path).encode())
    return digest.hexdigest()


@functools.cache
def code_version() -> str:
    """Of the packages that simulate, as they lie on this machine."""
    root = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for package in PACKAGES:
        for path in sorted(path for path in (root / package).rglob("*") if path.suffix in SUFFIXES):
            digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _files_of(case: Case) -> set[Path]:
    """All that it reads beside our code."""
    trace, world, control = case.traffic.trace, case.world, case.fleet.control
    named = _LENGTHS.findall(trace) if is_generator(trace) else [trace]
    named += [*world.tables.values(), *world.spot_traces.values()]
    uses = [case.fleet.routing.use, *(spec.use for spec in (*control.pipeline.policies, *control.pipeline.guards))]
    return {Path(name) for name in named} | set(_modules(uses))


def _modules(uses: Iterable[str]) -> Iterable[Path]:
    """The files of the operator's own policies."""
    for use in uses:
        module = use.partition(":")[0]
        if module.partition(".")[0] in PACKAGES:
            continue
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
        if spec is None or spec.origin is None:
            raise InvalidConfig(f"use {use!r}: there is no module {module}")
        yield Path(spec.origin)


def _content(path: Path) -> str:
    try:
        stat = path.stat()
        return _hashed(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise InvalidConfig(f"{path}: cannot be read: {error.strerror}") from error


@functools.cache
def _hashed(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=KEY_BYTES)).hexdigest()
