"""How long steps take: made to last as on another machine, or measured and fitted."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from cluster.performance import PerformanceModel, causal_pairs
from workers.engines.torch_engine.attention import Span

MIN_STEP_S = 1e-6  # A fit may find no constant part, but no step is free.


class StepShape(NamedTuple):
    """What of a step its duration depends on: the arguments of PerformanceModel.step_time_s."""

    prefill_tokens: int
    prefill_pairs: int
    sequences: int
    kv_tokens: int


def shape_of(spans: Iterable[Span]) -> StepShape:
    chunks = [span for span in spans if span.count > 1]
    contexts = [span.end for span in spans if span.count == 1]
    return StepShape(
        prefill_tokens=sum(span.count for span in chunks),
        prefill_pairs=sum(causal_pairs(span.start, span.count) for span in chunks),
        sequences=len(contexts),
        kv_tokens=sum(contexts),
    )


class Pacer:
    """Holds each step back until its emulated time is over, and counts those that were slower by themselves.

    Steps in a row last from one's end to the next one's: what the engine does between them is part of the second.
    """

    def __init__(self, pace: PerformanceModel) -> None:
        self.overruns = 0
        self._pace = pace
        self._ended_s = math.inf

    def hold(self, shape: StepShape, began_s: float, stopped: threading.Event) -> None:
        """Wait out a step that began at `began_s` of the monotonic clock, or when the one before it ended."""
        until_s = min(began_s, self._ended_s) + self._pace.step_time_s(*shape)
        now_s = time.monotonic()
        if now_s > until_s:
            self.overruns += 1
        else:
            stopped.wait(until_s - now_s)
        self._ended_s = max(now_s, until_s)

    def rest(self) -> None:
        """There is nothing to compute: the next step begins when it begins."""
        self._ended_s = math.inf


def fitted(measured: Sequence[tuple[StepShape, float]]) -> PerformanceModel:
    """Non-negative least squares of seconds over a step's shape, relative to each duration so that short steps count as much.

    A coefficient that comes out negative is dropped, the worst first, and the rest are fitted again.
    """
    seconds = np.array([duration_s for _, duration_s in measured])
    features = np.array([(1, *shape) for shape, _ in measured]) / seconds[:, None]
    scale = np.maximum(np.linalg.norm(features, axis=0), 1e-12)
    kept = list(range(features.shape[1]))
    solution = np.zeros(features.shape[1])
    while kept:
        solved = np.linalg.lstsq(features[:, kept] / scale[kept], np.ones(len(seconds)), rcond=None)[0]
        if solved.min() >= 0:
            solution[kept] = solved / scale[kept]
            break
        kept.pop(int(np.argmin(solved)))
    step_s, prefill_token_s, prefill_pair_s, sequence_s, kv_token_s = solution.tolist()
    return PerformanceModel(
        step_s=max(step_s, MIN_STEP_S),
        prefill_token_s=prefill_token_s,
        prefill_pair_s=prefill_pair_s,
        sequence_s=sequence_s,
        kv_token_s=kv_token_s,
    )
