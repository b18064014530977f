"""What a run of the reproductions is given, and where the published data is found."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from cluster.errors import InvalidConfig

ROOT = Path(__file__).parents[1]


def silent(_: str) -> None:
    """Tells nobody."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Of one run."""

    data_dir: Path
    """The shared traces and profiles: holds `manifest.md`."""
    quick: bool = False
    """Fewer and shorter runs, for a check that takes seconds: the values are rough."""
    seed: int = 0
    """Of every random stream."""
    prefill_cost: float = 1.0
    """A factor > 0 on the prefill times of every performance model. Not 1.0 only to see that predictions move with it."""
    tell: Callable[[str], None] = silent
    """Called with what is being measured, a few words, as often as there is news: for a progress display."""

    def __post_init__(self) -> None:
        if not 0.0 < self.prefill_cost < float("inf"):
            raise InvalidConfig(f"prefill cost {self.prefill_cost} is not above 0 and finite")


def found_data() -> Path:
    """$MOBULA_DATA, or `../shared/data` beside this tree. Raises InvalidConfig where it is absent."""
    path = Path(os.environ.get("MOBULA_DATA", ROOT / ".." / "shared" / "data")).resolve()
    if not (path / "manifest.md").is_file():
        raise InvalidConfig(
            f"no published traces and profiles at {path}: set MOBULA_DATA to the folder that holds their manifest.md"
        )
    return path
