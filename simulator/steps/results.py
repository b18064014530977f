"""What is counted as it happens: latencies of requests that end, gaps between tokens."""

from __future__ import annotations

from numba import njit

from simulator.sketch import bucket_of
from simulator.steps.records import (
    CACHED_TOKENS,
    COUNTED_FROM,
    DECODE,
    E2E,
    ENDED,
    ITL,
    KEPT,
    KV,
    NOW,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    REPLY_S,
    STEP_S,
    TPOT,
    TTFT,
    Fleet,
)
from simulator.steps.times import value


@njit(cache=True)
def count_end(fleet: Fleet, request: int) -> None:
    """One that has had its last token."""
    r = fleet.requests[request]
    if not r.counted:
        return
    reply_s, kind = fleet.clock[REPLY_S], r.slo_class
    ttft_s, e2e_s = r.first_s + reply_s - r.arrival_s, r.last_s + reply_s - r.arrival_s
    tpot_s = (r.last_s - r.first_s) / (r.output - 1) if r.output > 1 else 0.0
    fleet.sketches[kind, TTFT, bucket_of(ttft_s)] += 1
    fleet.sketches[kind, E2E, bucket_of(e2e_s)] += 1
    if r.output > 1:
        fleet.sketches[kind, TPOT, bucket_of(tpot_s)] += 1
    slo = fleet.slos
    kept = ttft_s <= slo[kind, 0] and tpot_s <= slo[kind, 1] and e2e_s <= slo[kind, 2]
    fleet.tallies[kind, ENDED] += 1
    fleet.tallies[kind, KEPT] += kept
    fleet.tallies[kind, PROMPT_TOKENS] += r.prompt
    fleet.tallies[kind, OUTPUT_TOKENS] += r.output
    fleet.tallies[kind, CACHED_TOKENS] += max(r.cached, 0)


@njit(cache=True)
def count_gap(fleet: Fleet, gap_s: float, times: int) -> None:
    """A gap between two tokens that so many clients saw."""
    if fleet.clock[NOW] >= fleet.clock[COUNTED_FROM]:
        fleet.sketches[0, ITL, bucket_of(gap_s)] += times


@njit(cache=True)
def count_steps(fleet: Fleet, engine: int, context_tokens: int, first: int, steps: int) -> None:
    """The gaps of decode steps `first` to `steps` of a span that began with so much context: each as long as its step.

    Steps only grow, so those that fall into one bucket lie together: the last of each bucket is found by halving.
    """
    e = fleet.engines[engine]
    if fleet.clock[NOW] < fleet.clock[COUNTED_FROM] or first >= steps:
        return
    same_s = fleet.scalars[e.times, STEP_S] + value(fleet, e.times, DECODE, e.batch)
    last = bucket_of(e.slowness * (same_s + value(fleet, e.times, KV, context_tokens + (steps - 1) * e.batch)))
    while first < steps:
        bucket = bucket_of(e.slowness * (same_s + value(fleet, e.times, KV, context_tokens + first * e.batch)))
        low, high = first + 1, steps
        while bucket != last and low < high:
            middle = (low + high) // 2
            at = bucket_of(e.slowness * (same_s + value(fleet, e.times, KV, context_tokens + middle * e.batch)))
            low, high = (middle + 1, high) if at == bucket else (low, middle)
        end = steps if bucket == last else low
        fleet.sketches[0, ITL, bucket] += (end - first) * e.batch
        first = end
