"""What a search must know of its traffic before it simulates any: how much arrives, of what length, and when most of it does."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.performance import PerformanceModel
from cluster.record import TraceRow
from policies.flow import Flow

BUSY_S = 60.0
"""The busiest minute is what a fleet is sized for beforehand: a shorter peak is mostly waited out within TTFT."""
SLICE_SHARE = 0.1
"""Of the traffic's time, the pilots' slice: long enough to miss more than the whole may miss, and ten times shorter."""
LEAST_SLICE_S = 60.0
NEVER_SLICED = 3  # Traffic shorter than so many slices is played whole: there is nothing to save.


class Slice(msgspec.Struct, frozen=True, kw_only=True):
    """The busiest stretch."""

    start_s: float
    span_s: float


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """Of the requests that count."""

    requests: int
    span_s: float
    mean: Flow
    """All of it at its mean rate, every prefix that was ever seen before taken for cached: no fleet has less to do."""
    busy: Flow
    """The busiest minute."""
    slice: Slice | None
    """None where the traffic is too short for pilots."""
    shared: bool
    """Whether prompts share prefixes, so that a slice needs warm caches."""


def survey(rows: Iterable[TraceRow], warm_up_s: float, performance: PerformanceModel) -> Survey:
    """performance: of any replica; it weighs prompts against outputs."""
    arrivals_s, prompts, outputs, cached = array("d"), array("q"), array("q"), array("q")
    seen: set[int] = set()
    for row in rows:
        arrivals_s.append(row.arrival_s)
        prompts.append(row.prompt_tokens)
        outputs.append(max(1, row.output_tokens))
        cached.append(_found(row, seen))
    times_s, tokens = np.array(arrivals_s), np.array([prompts, outputs, cached], float)
    span_s = max(float(times_s[-1]), 1.0)
    counted = times_s >= warm_up_s
    work_s = tokens[0] * performance.prefill_token_s + tokens[1] * (performance.sequence_s + tokens[0] * performance.kv_token_s)
    busy = _busiest(times_s, work_s, BUSY_S)
    length_s = max(SLICE_SHARE * span_s, LEAST_SLICE_S)
    begins_s = float(times_s[_busiest(times_s, work_s * counted, length_s)][0])
    return Survey(
        requests=int(counted.sum()),
        span_s=span_s,
        mean=_flow(tokens, len(times_s) / span_s),
        busy=_flow(tokens[:, busy] * [[1], [1], [0]], int(busy.sum()) / min(BUSY_S, span_s)),
        slice=Slice(start_s=max(begins_s, warm_up_s), span_s=length_s) if span_s > NEVER_SLICED * length_s else None,
        shared=bool(seen),
    )


def _found(row: TraceRow, seen: set[int]) -> int:
    """Tokens of the prompt's blocks that were there before, in a cache that forgets nothing."""
    known = 0
    for block in row.block_hashes:
        if block not in seen:
            break
        known += 1
    seen.update(row.block_hashes)
    return min(known * row.block_tokens, row.prompt_tokens - 1)


def _busiest(times_s: NDArray[np.float64], work_s: NDArray[np.float64], span_s: float) -> NDArray[np.bool_]:
    """Which requests arrive in the span, beginning with one's arrival, in which most work does."""
    sums = np.concatenate([[0.0], np.cumsum(work_s)])
    ends = np.searchsorted(times_s, times_s + span_s)
    first = int(np.argmax(sums[ends] - sums[:-1]))
    return (np.arange(len(times_s)) >= first) & (np.arange(len(times_s)) < ends[first])


def _flow(tokens: NDArray[np.float64], rate_rps: float) -> Flow:
    """tokens: of prompts, outputs, and of prompts found in a cache, by request."""
    prompts, outputs, cached = tokens
    return Flow(
        rate_rps=rate_rps,
        prompt_tokens=float((prompts - cached).mean()),
        prompt_tokens_sd=float((prompts - cached).std()),
        context_tokens=float(prompts.mean()),
        output_tokens=float(outputs.mean()),
    )
