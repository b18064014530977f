"""The highest load that still passes, found without trying them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def highest_passing(passes: Callable[[float], bool], grid: Sequence[float]) -> float:
    """The highest of rising loads that passes, where all below one that passes do too; 0.0 where none does. By halving."""
    low, high = 0, len(grid)
    while low < high:
        middle = (low + high) // 2
        if passes(grid[middle]):
            low = middle + 1
        else:
            high = middle
    return grid[low - 1] if low else 0.0
