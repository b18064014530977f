"""Llumnix's instances: LLaMA-7B on one A10 each, and how full and how free each says it is."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.hardware import accelerator
from cluster.measured import table_for
from cluster.models import model_shape
from cluster.step_table import StepTable
from simulator.engines import Engines
from simulator.steps.engines import BLOCKS_USED, RUNNING, WAITING_TOKENS, WAITS
from simulator.steps.records import NOBODY, PROMPTS_FIRST

SHAPE, KIND = "llama-2-7b", "a10"
TOKEN_BYTES = model_shape(SHAPE).kv_bytes_per_token()
MEMORY_SHARE = 0.9
"""Of an accelerator's memory, for weights and KV: vLLM's default."""
BLOCK_TOKENS, PLACES, STEP_TOKENS = 16, 256, 8192
"""vLLM's defaults of the time; a step of prompts takes as many as fit."""
LINK_BYTES_PER_S = 64e9 / 8
"""Of a node of four A10, each way: 64 Gbit/s (OSDI'24, section 6.1)."""
INSTANCES_A_NODE = 4


def step_times(prefill_cost: float) -> StepTable:
    """Of one instance: no profile of an A10 is at hand, so this is a roofline, as `fit.derived` says."""
    return table_for(SHAPE, KIND, 1).stretched(prefill=prefill_cost, decode=1.0)


def memory_blocks() -> int:
    """KV blocks that an A10 holds beside the weights."""
    free_bytes = MEMORY_SHARE * accelerator(KIND).memory_bytes - model_shape(SHAPE).weight_bytes()
    return int(free_bytes / TOKEN_BYTES) // BLOCK_TOKENS


def add_instance(engines: Engines, model: int) -> int:
    """An empty one; its engine's row."""
    return engines.add(
        model=model,
        kv_blocks=memory_blocks(),
        block_tokens=BLOCK_TOKENS,
        max_running=PLACES,
        step_budget_tokens=STEP_TOKENS,
        batching=PROMPTS_FIRST,
    )


class Seen(NamedTuple):
    """One instance at a moment; memory in blocks."""

    used: float
    head: float
    """That the first in its queue needs; 0 where nobody waits."""
    waiting: float
    """That all in its queue need."""
    running: int
    """Requests there, waiting or not."""

    @property
    def free(self) -> float:
        return memory_blocks() - self.used


def look(engines: Engines, rows: NDArray[np.int32], now_s: float) -> list[Seen]:
    """At these instances."""
    loads, state = engines.loads(rows, now_s), engines.state
    found = []
    for load, row in zip(loads, rows.tolist(), strict=True):
        first = int(state.engines["first_waiting"][row])
        head = 0.0 if first == NOBODY else blocks_of(engines, first)
        found.append(
            Seen(float(load[BLOCKS_USED]), head, float(load[WAITING_TOKENS]) / BLOCK_TOKENS, int(load[RUNNING] + load[WAITS]))
        )
    return found


def blocks_of(engines: Engines, request: int) -> float:
    """That a request needs now."""
    row = engines.state.requests[request]
    return math.ceil((int(row["prompt"]) + int(row["generated"])) / BLOCK_TOKENS)
