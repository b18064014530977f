"""The settings of a simulated world as a file: YAML, read as strictly as a cluster.yaml and refused in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from controller.config.reading import decoded, named, read_config
from simulator.world import World


def load_world(path: Path) -> World:
    """Relative paths in it are taken from the file's own directory. Raises InvalidConfig with value, bound and place."""
    data = read_config(path)
    with named(path):
        world = decoded(data, World)
    base = path.absolute().parent
    return msgspec.structs.replace(world, tables=_absolute(world.tables, base), spot_traces=_absolute(world.spot_traces, base))


def _absolute(files: Mapping[str, str], base: Path) -> dict[str, str]:
    return {name: str(base / Path(file).expanduser()) for name, file in files.items()}
