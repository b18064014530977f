"""How long steps take and what they draw, from the piecewise linear functions of a performance model.

A step lasts step_s + prefill(prompt tokens) + pairs * pair_s + decode(sequences) + kv(KV tokens). A span of decode steps of one
batch is summed in closed form: its KV tokens are an arithmetic progression, and `kv` is affine between two knots.
"""

from __future__ import annotations

import math

from numba import njit

from simulator.steps.records import (
    DECODE,
    DECODE_W,
    KV,
    MIXED_FACTOR,
    PAIR_S,
    PREFILL,
    PREFILL_W,
    STEP_J,
    STEP_S,
    Fleet,
)


@njit(cache=True)
def value(fleet: Fleet, model: int, function: int, x: float) -> float:
    """Of one piecewise linear function, which goes on along its last piece."""
    knots, piece = fleet.knots, 0
    while piece + 1 < fleet.knot_counts[model, function] and x >= knots[model, function, piece + 1, 0]:
        piece += 1
    return knots[model, function, piece, 1] + knots[model, function, piece, 2] * (x - knots[model, function, piece, 0])


@njit(cache=True)
def prompt_part_s(fleet: Fleet, model: int, tokens: float, pairs: float) -> float:
    return value(fleet, model, PREFILL, tokens) + pairs * fleet.scalars[model, PAIR_S]


@njit(cache=True)
def step_s(fleet: Fleet, model: int, prompt_tokens: int, pairs: int, sequences: int, kv_tokens: int) -> float:
    """Of one step."""
    fixed = fleet.scalars[model, STEP_S]
    prompts = prompt_part_s(fleet, model, prompt_tokens, pairs) if prompt_tokens > 0 else 0.0
    if sequences == 0:
        return fixed + prompts
    factor = fleet.scalars[model, MIXED_FACTOR]
    if prompt_tokens > 0 and factor > 0.0:
        return factor * (fixed + prompt_part_s(fleet, model, prompt_tokens + sequences, pairs))
    return fixed + prompts + value(fleet, model, DECODE, sequences) + value(fleet, model, KV, kv_tokens)


@njit(cache=True)
def span_s(fleet: Fleet, model: int, sequences: int, kv_tokens: int, steps: int) -> float:
    """Of so many decode steps in a row, each of which leaves `sequences` more KV tokens to the next."""
    total = steps * (fleet.scalars[model, STEP_S] + value(fleet, model, DECODE, sequences))
    knots, count = fleet.knots, fleet.knot_counts[model, KV]
    piece, done, tokens = 0, 0, kv_tokens
    while done < steps:
        while piece + 1 < count and tokens >= knots[model, KV, piece + 1, 0]:
            piece += 1
        many = steps - done
        if piece + 1 < count:  # Those whose tokens are below the next knot.
            many = min(many, int(math.ceil((knots[model, KV, piece + 1, 0] - tokens) / sequences)))
        slope = knots[model, KV, piece, 2]
        first = knots[model, KV, piece, 1] + slope * (tokens - knots[model, KV, piece, 0])
        total += many * first + (many * (many - 1) // 2) * (sequences * slope)
        done += many
        tokens += many * sequences
    return total


@njit(cache=True)
def steps_to(fleet: Fleet, model: int, sequences: int, kv_tokens: int, steps: int, seconds: float) -> int:
    """The least number of steps, 1 to `steps`, whose span is at least so long; `steps` where none is."""
    low, high = 1, steps
    while low < high:
        middle = (low + high) // 2
        if span_s(fleet, model, sequences, kv_tokens, middle) >= seconds:
            high = middle
        else:
            low = middle + 1
    return low


@njit(cache=True)
def step_j(fleet: Fleet, model: int, prompt_tokens: int, pairs: int, sequences: int, lasting_s: float, steps: int) -> float:
    """Joules of equal steps that last so long in all: watts of prompts while those are computed, of decoding for the rest."""
    prompts_s = min(prompt_part_s(fleet, model, prompt_tokens, pairs), lasting_s) if prompt_tokens > 0 else 0.0
    if sequences == 0:
        prompts_s = lasting_s
    watts = value(fleet, model, DECODE_W, sequences)
    extra = steps * fleet.scalars[model, STEP_J]
    return prompts_s * fleet.scalars[model, PREFILL_W] + (lasting_s - prompts_s) * watts + extra
