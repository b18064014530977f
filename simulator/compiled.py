"""Whether the compiled part of the simulator has been compiled before: if not, the first run begins with a long silence."""

from __future__ import annotations

from pathlib import Path

from simulator.steps.engines import advance


def compiled_before() -> bool:
    """Its cache is there. Importing `simulator.steps` has thrown away one that is older than its sources."""
    return any(Path(advance.stats.cache_path).glob(f"engines.{advance.__name__}-*.nbi"))
