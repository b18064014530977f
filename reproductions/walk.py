"""Which reproductions there are, and their rows one by one.

There is no list of them: a module of this package that has a function `rows` is one.
"""

from __future__ import annotations

import importlib
import pkgutil
import time
from collections.abc import Iterator, Sequence
from types import ModuleType

import msgspec

import reproductions
from cluster.errors import InvalidConfig
from reproductions.row import Row
from reproductions.settings import Settings


def found(package: ModuleType = reproductions) -> dict[str, ModuleType]:
    """By name, in order of names."""
    modules = {
        info.name: importlib.import_module(f"{package.__name__}.{info.name}") for info in pkgutil.iter_modules(package.__path__)
    }
    return {name: module for name, module in sorted(modules.items()) if hasattr(module, "rows")}


def named(names: Sequence[str], package: ModuleType = reproductions) -> dict[str, ModuleType]:
    """Those of these names, `-` as `_`, in the order asked for. Raises InvalidConfig for a name that is none's."""
    known = found(package)
    wanted = [name.replace("-", "_").lower() for name in names]
    for name in wanted:
        if name not in known:
            raise InvalidConfig(f"no reproduction is called {name!r}; there are {', '.join(known) or 'none'}")
    return {name: known[name] for name in wanted}


def reproduced(module: ModuleType, settings: Settings) -> Iterator[Row]:
    """Each row as it comes, with the seconds since the row before it."""
    began_s = time.perf_counter()
    for row in module.rows(settings):
        now_s = time.perf_counter()
        yield msgspec.structs.replace(row, seconds=now_s - began_s, quick=settings.quick)
        began_s = now_s
