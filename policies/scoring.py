"""The compiled pass of routing: every replica filtered and scored for one request, best and second best kept.

Lower is better. A candidate's score is seconds of latency, its own and what it costs others:
    ttft_s + output tokens * tpot_s + burden_s + miss_s.
Ties go to less load, then to replicas in turn by request, so that equals share alike.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from policies.cells import (
    BLOCK_TOKENS,
    BLOCKS_USED,
    CONTEXT_TOKENS,
    DECODES,
    HEARD_S,
    HOST,
    IDENTITY,
    KV_BLOCKS,
    KV_TOKEN_BYTES,
    KV_TOKEN_S,
    KV_TOKENS,
    LAYERS,
    LAYOUT,
    MAX_RUNNING,
    PREFILL_PAIR_S,
    PREFILL_TOKEN_S,
    PREFILLS,
    RANK,
    READY,
    READY_SINCE_S,
    SEQUENCE_S,
    SEQUENCES,
    STEP_BUDGET,
    STEP_S,
    WAITING_TOKENS,
)

Floats = NDArray[np.float64]

LOCAL, DECODE, PREFILL, OUTLOOK, PICKS = 0, 2, 4, 6, 7
"""Rows of the answer. Each of the first three is followed by its runner-up: prefill and decode in one place; decode after a remote
prefill; that prefill. OUTLOOK says why there is nobody."""

(
    ROW,
    HELD_BACK,
    SCORE,
    LOAD,
    TURN,
    QUEUE_S,
    OWN_PREFILL_S,
    TRANSFER_S,
    TTFT_S,
    DECODE_STEP_S,
    DRAG_S,
    TPOT_S,
    BURDEN_S,
    MISS_S,
    CACHED_TOKENS,
    WIDTH,
) = range(16)
"""Columns of the first six rows. HELD_BACK is 1 for a newcomer that this request was not drawn for: a last resort."""

DECODERS, FITTING, REACHABLE, ROOM_S = 0, 1, 2, 3
"""Columns of OUTLOOK: replicas that decode, that could ever hold the request, that are ready; seconds until one has room."""


@njit(cache=True)
def score(
    rows: Floats,
    holders: NDArray[np.uint8],
    depths: Floats,
    request: int,
    prompt: float,
    output: float,
    max_output: float,
    ttft_slo_s: float,
    tpot_slo_s: float,
    now_s: float,
    oldest_prefill_s: float,
    oldest_decode_s: float,
    stale_s: float,
    ramp_s: float,
    slo_miss_s: float,
    link_bytes_per_s: float,
    host_bytes_per_s: float,
    transfer_setup_s: float,
) -> Floats:
    """The answer, [PICKS, WIDTH].

    holders: [1 + len(depths), bytes], bitmasks of rows, lowest first: the excluded, then who holds `depths` blocks, deepest first.
    request: a hash of its id, 0 to 2**62. The rest as in Ask, RoutingView and PredictedLatencyRouter; bounds may be inf.
    """
    picks = np.full((PICKS, WIDTH), np.inf)
    picks[:, ROW] = -1.0
    picks[OUTLOOK, :ROOM_S] = 0.0
    terms = np.zeros(WIDTH)
    for i in range(len(rows)):
        cells = rows[i]
        if not cells[DECODES]:
            continue
        picks[OUTLOOK, DECODERS] += 1
        if not _fits(cells, prompt + max_output):
            continue
        picks[OUTLOOK, FITTING] += 1
        if not _reachable(cells, now_s, stale_s) or _bit(holders, 0, i):
            continue
        picks[OUTLOOK, REACHABLE] += 1
        blocks = math.ceil((prompt + output) / cells[BLOCK_TOKENS])
        if cells[SEQUENCES] >= cells[MAX_RUNNING] or cells[BLOCKS_USED] + blocks > cells[KV_BLOCKS]:
            picks[OUTLOOK, ROOM_S] = min(picks[OUTLOOK, ROOM_S], _room_s(cells, blocks, prompt, output))
            continue
        cached = _cached(cells, holders, depths, i, prompt)
        held_back = _held_back(cells, request, now_s, oldest_decode_s, ramp_s)
        _place(terms, cells, i, request, held_back, len(rows), cached)

        _prompt_terms(terms, cells, prompt, cached)
        _decode_terms(terms, cells, prompt, output, 0.0)
        terms[TTFT_S] = terms[QUEUE_S] + terms[OWN_PREFILL_S]
        misses = (1.0 if terms[TTFT_S] > ttft_slo_s else 0.0) + (1.0 if terms[TPOT_S] > tpot_slo_s else 0.0)
        _finish(terms, output, misses * slo_miss_s)
        _offer(picks, LOCAL, terms)

        if cells[LAYOUT]:
            queue_s = terms[QUEUE_S]
            terms[QUEUE_S] = terms[OWN_PREFILL_S] = terms[BURDEN_S] = 0.0
            _decode_terms(terms, cells, prompt, output, queue_s)
            wire_s = (prompt - cached) * cells[KV_TOKEN_BYTES] / link_bytes_per_s
            terms[TRANSFER_S] = terms[TTFT_S] = transfer_setup_s + wire_s / cells[LAYERS]
            _finish(terms, output, slo_miss_s if terms[TPOT_S] > tpot_slo_s else 0.0)
            _offer(picks, DECODE, terms)

    target = int(picks[DECODE, ROW])
    if target < 0:
        return picks
    moved = prompt - picks[DECODE, CACHED_TOKENS]
    terms[:] = 0.0
    for i in range(len(rows)):
        cells = rows[i]
        if i == target or not cells[PREFILLS] or cells[LAYOUT] != rows[target, LAYOUT] or _bit(holders, 0, i):
            continue
        if not _fits(cells, prompt + 1) or not _reachable(cells, now_s, stale_s):
            continue
        if cells[BLOCKS_USED] + math.ceil(prompt / cells[BLOCK_TOKENS]) > cells[KV_BLOCKS]:
            continue
        cached = _cached(cells, holders, depths, i, prompt)
        held_back = _held_back(cells, request, now_s, oldest_prefill_s, ramp_s)
        _place(terms, cells, i, request, held_back, len(rows), cached)
        _prompt_terms(terms, cells, prompt, cached)
        together = cells[HOST] and cells[HOST] == rows[target, HOST]
        wire_s = moved * cells[KV_TOKEN_BYTES] / (host_bytes_per_s if together else link_bytes_per_s)
        # Layers travel while later ones are computed: what shows is the last layer, or what computing does not cover.
        terms[TRANSFER_S] = transfer_setup_s + max(wire_s / cells[LAYERS], wire_s - terms[OWN_PREFILL_S])
        terms[TTFT_S] = terms[QUEUE_S] + terms[OWN_PREFILL_S] + terms[TRANSFER_S]
        _finish(terms, output, slo_miss_s if terms[TTFT_S] > ttft_slo_s else 0.0)
        _offer(picks, PREFILL, terms)
    return picks


@njit(cache=True)
def _fits(cells: Floats, tokens: float) -> bool:
    """Whether an empty replica could hold so many tokens."""
    return bool(tokens <= min(cells[CONTEXT_TOKENS], cells[KV_BLOCKS] * cells[BLOCK_TOKENS]))


@njit(cache=True)
def _reachable(cells: Floats, now_s: float, stale_s: float) -> bool:
    return bool(cells[READY] > 0 and now_s - cells[HEARD_S] <= stale_s)


@njit(cache=True)
def _bit(holders: NDArray[np.uint8], level: int, row: int) -> bool:
    return bool((holders[level, row >> 3] >> (row & 7)) & 1)


@njit(cache=True)
def _cached(cells: Floats, holders: NDArray[np.uint8], depths: Floats, row: int, prompt: float) -> float:
    """Prompt tokens found there. The last is always computed: its logits give the first token."""
    for level in range(len(depths)):
        if _bit(holders, level + 1, row):
            size = cells[BLOCK_TOKENS]
            return float(min(depths[level], (prompt - 1) // size) * size)
    return 0.0


@njit(cache=True)
def _held_back(cells: Floats, request: int, now_s: float, oldest_s: float, ramp_s: float) -> float:
    """1 for a newcomer that this request was not drawn for. Its share grows from 0 to 1 over `ramp_s`."""
    since_s = cells[READY_SINCE_S]
    if not since_s - oldest_s >= ramp_s or now_s - since_s >= ramp_s:
        return 0.0
    mixed = (np.uint64(request) ^ np.uint64(cells[IDENTITY])) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    draw = float(mixed >> np.uint64(11)) / 2.0**53
    return 1.0 if draw * ramp_s >= now_s - since_s else 0.0


@njit(cache=True)
def _place(terms: Floats, cells: Floats, row: int, request: int, held_back: float, rows: int, cached: float) -> None:
    terms[:] = 0.0
    terms[ROW] = row
    terms[HELD_BACK] = held_back
    terms[LOAD] = cells[SEQUENCES] + cells[WAITING_TOKENS] / cells[STEP_BUDGET]
    terms[TURN] = (int(cells[RANK]) + request) % rows
    terms[CACHED_TOKENS] = cached


@njit(cache=True)
def _prompt_terms(terms: Floats, cells: Floats, prompt: float, cached: float) -> None:
    """Queue and own prefill, in chunks that leave room for the decodes beside them, and what those decodes lose by it."""
    batch = cells[SEQUENCES] * cells[DECODES]
    beside_s = cells[STEP_S] + batch * cells[SEQUENCE_S] + cells[DECODES] * cells[KV_TOKENS] * cells[KV_TOKEN_S]
    chunk = max(cells[STEP_BUDGET] - batch, 1.0)
    ahead, own = cells[WAITING_TOKENS], prompt - cached
    # Prompts ahead are taken to be about as long as this one.
    ahead_s = ahead * (cells[PREFILL_TOKEN_S] + 0.5 * prompt * cells[PREFILL_PAIR_S])
    own_s = own * (cells[PREFILL_TOKEN_S] + (cached + 0.5 * own) * cells[PREFILL_PAIR_S])
    terms[QUEUE_S] = math.ceil(ahead / chunk) * beside_s + ahead_s
    terms[OWN_PREFILL_S] = math.ceil(own / chunk) * beside_s + own_s
    terms[BURDEN_S] = batch * own_s


@njit(cache=True)
def _decode_terms(terms: Floats, cells: Floats, prompt: float, output: float, backlog_s: float) -> None:
    """Step with one sequence more, what prompts computed beside it add to each token, and what the others lose by it."""
    batch, context = cells[SEQUENCES], prompt + 0.5 * output
    own_s = cells[SEQUENCE_S] + context * cells[KV_TOKEN_S]
    terms[DECODE_STEP_S] = cells[STEP_S] + batch * cells[SEQUENCE_S] + cells[KV_TOKENS] * cells[KV_TOKEN_S] + own_s
    terms[DRAG_S] = min(backlog_s / output, cells[STEP_BUDGET] * (cells[PREFILL_TOKEN_S] + 0.5 * prompt * cells[PREFILL_PAIR_S]))
    terms[TPOT_S] = terms[DECODE_STEP_S] + terms[DRAG_S]
    terms[BURDEN_S] += batch * output * own_s


@njit(cache=True)
def _finish(terms: Floats, output: float, miss_s: float) -> None:
    terms[MISS_S] = miss_s
    terms[SCORE] = terms[TTFT_S] + output * terms[TPOT_S] + terms[BURDEN_S] + miss_s


@njit(cache=True)
def _offer(picks: Floats, slot: int, terms: Floats) -> None:
    """Keep the terms if they are best or second best."""
    if _before(terms, picks[slot]):
        picks[slot + 1] = picks[slot]
        picks[slot] = terms
    elif _before(terms, picks[slot + 1]):
        picks[slot + 1] = terms


@njit(cache=True)
def _before(one: Floats, other: Floats) -> bool:
    for column in (HELD_BACK, SCORE, LOAD, TURN):
        if one[column] != other[column]:
            return bool(one[column] < other[column])
    return False


@njit(cache=True)
def _room_s(cells: Floats, blocks: float, prompt: float, output: float) -> float:
    """Seconds until enough of what runs has ended, if it ends evenly over the time of one request's whole output."""
    batch = max(cells[SEQUENCES], 1.0)
    slots = cells[SEQUENCES] + 1 - cells[MAX_RUNNING]
    short = cells[BLOCKS_USED] + blocks - cells[KV_BLOCKS]
    ending = max(slots, math.ceil(short * batch / max(cells[BLOCKS_USED], 1.0)), 1.0)
    step_s = cells[STEP_S] + batch * cells[SEQUENCE_S] + cells[KV_TOKENS] * cells[KV_TOKEN_S]
    span_s = output * step_s + 0.5 * output * (output - 1) * batch * cells[KV_TOKEN_S]
    ahead_s = cells[WAITING_TOKENS] * (cells[PREFILL_TOKEN_S] + 0.5 * prompt * cells[PREFILL_PAIR_S])
    return float(min(ending / batch, 1.0) * (span_s + ahead_s))
