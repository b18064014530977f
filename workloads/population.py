"""Whose requests come, and how urgent: tenants, SLO classes and priorities, each drawn by its weight, on its own."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from workloads.chance import stream


class Shares(msgspec.Struct, frozen=True):
    """Values and how often each comes, as weights > 0."""

    values: tuple[str, ...] | tuple[int, ...]
    weights: tuple[float, ...] = (1.0,)

    def draw(self, chance: np.random.Generator, count: int) -> list[str] | list[int]:
        if len(self.values) == 1:
            return list(self.values) * count
        bounds = np.cumsum(self.weights)[:-1] / sum(self.weights)
        return [self.values[place] for place in np.searchsorted(bounds, chance.random(count), side="right").tolist()]


class Population(msgspec.Struct, frozen=True, kw_only=True):
    """Who may ask."""

    tenants: Shares = Shares(("default",))
    classes: Shares = Shares(("default",))
    priorities: Shares = Shares((0,))

    def drawing(self, seed: int) -> PopulationDrawing:
        return PopulationDrawing(self, seed)


class PopulationDrawing:
    """A population and its three streams of chance."""

    def __init__(self, population: Population, seed: int) -> None:
        concerns = {"tenants": population.tenants, "classes": population.classes, "priorities": population.priorities}
        self._drawn = [(shares, stream(seed, concern)) for concern, shares in concerns.items()]

    def next(self, count: int) -> Iterator[tuple[str, str, int]]:
        """Tenant, SLO class and priority of the next `count`."""
        return zip(*(shares.draw(chance, count) for shares, chance in self._drawn), strict=True)
