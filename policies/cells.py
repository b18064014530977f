"""The table of a model's replicas that a router reads: what its columns are, and how its rows change, compiled.

A row's load changes several times for each request; each change is one call, since a handful of numpy's would cost more than
routing itself.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

(
    READY,
    PREFILLS,
    DECODES,
    HEARD_S,
    READY_SINCE_S,
    RANK,
    IDENTITY,
    HOST,
    CONTEXT_TOKENS,
    MAX_RUNNING,
    STEP_BUDGET,
    KV_BLOCKS,
    BLOCK_TOKENS,
    LAYERS,
    KV_TOKEN_BYTES,
    LAYOUT,
    STEP_S,
    PREFILL_TOKEN_S,
    PREFILL_PAIR_S,
    SEQUENCE_S,
    KV_TOKEN_S,
    SEQUENCES,
    WAITING_TOKENS,
    KV_TOKENS,
    BLOCKS_USED,
    COLUMNS,
) = range(26)
"""Columns of a row. From SEQUENCES on they move with load; the rest are facts of the membership table.

READY, PREFILLS (for others) and DECODES are 0 or 1. RANK orders replicas by id. HOST and LAYOUT are equal where hosts and
layouts are; LAYOUT 0 is none, HOST 0 shares memory with nobody. SEQUENCES: requests running or waiting. KV_TOKENS: context of
those, when their prompts will be done. HEARD_S is -inf for a suspect.
"""

Rows = NDArray[np.float64]


@njit(cache=True)
def add_load(rows: Rows, row: int, sequences: float, waiting_tokens: float, kv_tokens: float, blocks: float) -> None:
    """More of it, or less: nothing falls below 0."""
    cells = rows[row]
    cells[SEQUENCES] = max(cells[SEQUENCES] + sequences, 0.0)
    cells[WAITING_TOKENS] = max(cells[WAITING_TOKENS] + waiting_tokens, 0.0)
    cells[KV_TOKENS] = max(cells[KV_TOKENS] + kv_tokens, 0.0)
    cells[BLOCKS_USED] = max(cells[BLOCKS_USED] + blocks, 0.0)


@njit(cache=True)
def set_load(
    rows: Rows, row: int, heard_s: float, sequences: float, waiting_tokens: float, kv_tokens: float, blocks: float
) -> None:
    """As its own report has it."""
    cells = rows[row]
    cells[HEARD_S] = heard_s
    cells[SEQUENCES] = sequences
    cells[WAITING_TOKENS] = waiting_tokens
    cells[KV_TOKENS] = kv_tokens
    cells[BLOCKS_USED] = blocks
