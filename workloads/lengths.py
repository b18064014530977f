"""Distributions of lengths in tokens, of turns and of waits, drawn many at a time: by a formula or from a trace's own rows."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidConfig
from workloads.traces import MAX_TOKENS, open_trace

MAX_EMPIRICAL_ROWS = 1_000_000  # 16 MB, and more than a distribution's shape needs.


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Whole numbers in [low, high]; what falls outside is clipped."""

    kind: str
    """fixed (first), uniform (first to second, both included), lognormal (median first, sigma second), geometric (mean first)."""
    first: float
    second: float = 0.0
    low: int = 1
    high: int = MAX_TOKENS

    @property
    def mean(self) -> float:
        """Before clipping below; clipped above as a whole, so that it stays finite."""
        mean = {
            "uniform": (self.first + self.second) / 2,
            "lognormal": self.first * math.exp(min(self.second**2 / 2, 50.0)),
        }.get(self.kind, self.first)
        return min(mean, float(self.high))

    def draw(self, chance: np.random.Generator, count: int) -> NDArray[np.int64]:
        if self.kind == "uniform":
            return np.clip(chance.integers(round(self.first), round(self.second), count, endpoint=True), self.low, self.high)
        return np.clip(np.rint(_drawn(self.kind, self.first, self.second, chance, count)), self.low, self.high).astype(np.int64)


class Waits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds in [0, high]; what falls above is clipped."""

    kind: str
    """fixed (first), uniform (first to second), lognormal (median first, sigma second) or exponential (mean first)."""
    first: float
    second: float = 0.0
    high: float = math.inf

    def draw(self, chance: np.random.Generator, count: int) -> NDArray[np.float64]:
        return np.minimum(_drawn(self.kind, self.first, self.second, chance, count), self.high)


class Empirical(msgspec.Struct, frozen=True, kw_only=True):
    """Lengths that were seen, each as likely as it was frequent."""

    seen: Any
    """An array of whole numbers, not empty."""

    def draw(self, chance: np.random.Generator, count: int) -> NDArray[np.int64]:
        return self.seen[chance.integers(len(self.seen), size=count)]


def lengths_of(path: str) -> tuple[Empirical, Empirical]:
    """Prompt and output lengths of a trace's first rows, at most MAX_EMPIRICAL_ROWS. Raises InvalidTrace or InvalidConfig."""
    seen = [(row.prompt_tokens, row.output_tokens) for row in islice(open_trace(path), MAX_EMPIRICAL_ROWS)]
    if not seen:
        raise InvalidConfig(f"{path}: has no rows")
    prompts, outputs = np.array(seen, dtype=np.int64).T.copy()
    return Empirical(seen=prompts), Empirical(seen=outputs)


def _drawn(kind: str, first: float, second: float, chance: np.random.Generator, count: int) -> NDArray[np.float64]:
    match kind:
        case "fixed":
            return np.full(count, first)
        case "uniform":
            return chance.uniform(first, second, count)
        case "lognormal":
            return first * chance.lognormal(0.0, second, count)
        case "geometric":
            return chance.geometric(1.0 / first, count).astype(np.float64)
        case "exponential":
            return first * chance.standard_exponential(count)
        case _:
            raise ValueError(f"{kind!r} is no distribution")
