"""Ranges of settings. Each raises the ValueError that a config's reader turns into a refusal with its place."""

from __future__ import annotations

import math


def at_least(low: float, **settings: float) -> None:
    """Finite numbers in [low, inf)."""
    for name, value in settings.items():
        if not low <= value < math.inf:
            raise ValueError(f"{name} {value} is outside [{low}, inf)")


def positive(**settings: float) -> None:
    """Finite numbers in (0, inf)."""
    for name, value in settings.items():
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} {value} is outside (0, inf)")


def share(**settings: float) -> None:
    """Numbers in (0, 1]."""
    for name, value in settings.items():
        if not 0.0 < value <= 1.0:
            raise ValueError(f"{name} {value} is outside (0, 1]")
