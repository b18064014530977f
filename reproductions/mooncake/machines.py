"""What a node of Mooncake's testbed is here: a dummy LLaMA3-70B on eight A800, its memory, its links and its step times."""

from __future__ import annotations

from cluster.hardware import accelerator
from cluster.measured import table_for
from cluster.models import model_shape
from cluster.step_table import StepTable

SHAPE, KIND, DEVICES = "llama-3.1-70b", "a100-80g", 8
"""The A800 is an A100 with slower NVLink; its arithmetic and its memory are the A100's."""
LAYERS = model_shape(SHAPE).layers
TOKEN_BYTES = model_shape(SHAPE).kv_bytes_per_token()
LINK_BYTES_PER_S = 4 * 200e9 / 8
"""Of a node, each way: four links of 200 Gbit/s (Mooncake, FAST'25, section 5)."""
MEMORY_SHARE = 0.9
"""Of an accelerator's memory, for weights and KV: vLLM's default."""
BLOCK_TOKENS = 512
"""Of a block of the trace, and of the cache."""
CACHE_TOKENS = 3_000_000
"""Of one node's cache in main memory (FAST'25, section 5: 3M tokens a node)."""


def step_times(prefill_cost: float) -> StepTable:
    """Of one node. Its decode steps are scaled from a measured profile, its prompts are a roofline: see `fit.derived`."""
    return table_for(SHAPE, KIND, DEVICES).stretched(prefill=prefill_cost, decode=1.0)


def memory_tokens() -> int:
    """Tokens whose KV a node's accelerators hold beside the weights."""
    free_bytes = MEMORY_SHARE * DEVICES * accelerator(KIND).memory_bytes - model_shape(SHAPE).weight_bytes()
    return int(free_bytes / TOKEN_BYTES)
