"""Finding a fleet's journal: of a running fleet, of one that is down, or a file that lies elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cli.fleet_home import FleetHome, fleets, only_fleet, root
from cluster.errors import InvalidConfig
from controller.journal import Journal

FleetName = Annotated[str | None, typer.Option("--fleet", metavar="NAME", help="Of which fleet; may be left out with only one.")]
JournalFile = Annotated[Path | None, typer.Option("--journal", metavar="FILE", help="A journal that lies elsewhere.")]


@contextmanager
def opened(fleet: str | None, file: Path | None) -> Iterator[Journal]:
    """A journal to read. Raises InvalidConfig where there is none, InvalidTrace for one that this release does not read."""
    path = file or home_of(fleet).journal_path
    if not path.is_file():
        raise InvalidConfig(f"there is no journal at {path}")
    journal = Journal(path, read_only=True)
    try:
        yield journal
    finally:
        journal.close()


def home_of(fleet: str | None) -> FleetHome:
    """Of the fleet named, else of the only one that is up, else of the only one that has left a journal."""
    if fleet is not None or fleets():
        return FleetHome(only_fleet(fleet))
    left = sorted(path.parent.name for path in root().glob(f"*/{FleetHome('any').journal_path.name}"))
    if len(left) == 1:
        return FleetHome(left[0])
    found = f"{len(left)} fleets have left one: {', '.join(left)}; choose with --fleet" if left else f"none lies under {root()}"
    raise InvalidConfig(f"no fleet is up, and of journals {found}")
