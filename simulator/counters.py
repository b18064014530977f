"""What a simulated gateway counts of demand and latency, as `gateway.metrics` exports it to the controller."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable

from cluster.metrics import (
    ARRIVALS,
    ARRIVED_TOKENS,
    ARRIVED_TOKENS_SQUARED,
    CACHED_TOKENS,
    IN_FLIGHT,
    LATENCY_BUCKETS_S,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    QUEUED,
    REQUESTS,
    TPOT,
    TTFT,
    Sample,
)

_BOUNDS = tuple("+Inf" if math.isinf(bound) else str(bound) for bound in (*LATENCY_BUCKETS_S, math.inf))


class Counters:
    """Of one gateway and model."""

    def __init__(self, instance: str, model: str) -> None:
        self.labels = (("instance", instance), ("model", model))
        self.arrivals = self.arrived_tokens = self.arrived_tokens_squared = 0
        self.ended = self.prompt_tokens = self.output_tokens = self.cached_tokens = 0
        self.queued = self.in_flight = 0
        self._ttft, self._tpot = ([0] * (len(LATENCY_BUCKETS_S) + 1) for _ in range(2))

    def arrived(self, prompt_tokens: int) -> None:
        self.in_flight += 1
        self.arrivals += 1
        self.arrived_tokens += prompt_tokens
        self.arrived_tokens_squared += prompt_tokens * prompt_tokens

    def end(self, prompt: int, output: int, cached: int, ttft_s: float | None, tpot_s: float | None) -> None:
        self.in_flight -= 1
        self.ended += 1
        self.prompt_tokens += prompt
        self.output_tokens += output
        self.cached_tokens += cached
        if ttft_s is not None:
            self._ttft[bisect_left(LATENCY_BUCKETS_S, ttft_s)] += 1
        if tpot_s is not None:
            self._tpot[bisect_left(LATENCY_BUCKETS_S, tpot_s)] += 1

    def samples(self) -> list[Sample]:
        values = {
            ARRIVALS: self.arrivals,
            ARRIVED_TOKENS: self.arrived_tokens,
            ARRIVED_TOKENS_SQUARED: self.arrived_tokens_squared,
            PROMPT_TOKENS: self.prompt_tokens,
            CACHED_TOKENS: self.cached_tokens,
            OUTPUT_TOKENS: self.output_tokens,
            REQUESTS: self.ended,
            QUEUED: self.queued,
            IN_FLIGHT: self.in_flight,
        }
        made = [Sample(name, self.labels, float(value)) for name, value in values.items()]
        return [*made, *self._histogram(TTFT, self._ttft), *self._histogram(TPOT, self._tpot)]

    def _histogram(self, name: str, counts: list[int]) -> Iterable[Sample]:
        instance, model = self.labels
        for bound, total in zip(_BOUNDS, itertools.accumulate(counts), strict=True):
            yield Sample(name, (instance, ("le", bound), model), float(total))
