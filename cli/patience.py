"""A progress bar on a terminal for what takes longer than a moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

PATIENCE_S = 1.0  # A progress bar that would be gone before it is read is not shown.


@contextmanager
def patience(what: str) -> Iterator[Callable[[int, int], None]]:
    """To be told how much of how much is done."""
    from rich.progress import Progress

    console = Console(stderr=True)
    began_s = time.monotonic()
    bar = Progress(console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=None)

    def told(done: int, of: int) -> None:
        bar.update(task, completed=done, total=of)
        if time.monotonic() - began_s > PATIENCE_S:
            bar.start()

    try:
        yield told
    finally:
        bar.stop()
