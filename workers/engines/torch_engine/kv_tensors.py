"""The tensors behind the block pool: one per layer, blocks of heads of tokens.

A layer's shape is [blocks + 1, 2 (key, value), kv_heads, block_tokens, head_dim]: head before token, so that gathering a
sequence's blocks head by head gives keys that a batched matrix product reads without another copy. The last block is
padding: it stays zero and stands where a shorter sequence of a batch has no block.
"""

from __future__ import annotations

import numpy as np
import psutil
import torch

from cluster.errors import InvalidConfig
from cluster.kv import KvLayout

MEMORY_SHARE = 0.9  # The rest is for weights' temporaries and the process itself.


class KvTensors:
    """Keys and values of every block, in every layer."""

    def __init__(self, layout: KvLayout, blocks: int, device: torch.device) -> None:
        _refuse_more_than_memory(layout, blocks, device)
        self.layout = layout
        self.blocks = blocks
        self.device = device
        self.dtype = getattr(torch, layout.dtype)
        shape = (blocks + 1, 2, layout.kv_heads, layout.block_tokens, layout.head_dim)
        self.layers = [torch.zeros(shape, dtype=self.dtype, device=device) for _ in range(layout.layers)]
        # The same memory, as attention reads it (one row: a block of one head) and writes it (one row: a token of one head).
        self.block_rows = [layer.view(-1, layout.block_tokens * layout.head_dim) for layer in self.layers]
        self.token_rows = [layer.view(-1, layout.head_dim) for layer in self.layers]

    @property
    def padding(self) -> int:
        return self.blocks

    def read(self, layer: int, table: np.ndarray, first_token: int, end_token: int) -> np.ndarray:
        """KV of a sequence's tokens [first_token, end_token), shape [2, n, kv_heads, head_dim]; bfloat16 as uint16."""
        size = self.layout.block_tokens
        first_block, end_block = first_token // size, -(-end_token // size)
        blocks = torch.as_tensor(table[first_block:end_block], device=self.device)
        kv = self.layers[layer].index_select(0, blocks).permute(1, 0, 3, 2, 4)
        kv = kv.reshape(2, -1, self.layout.kv_heads, self.layout.head_dim)
        kv = kv[:, first_token - first_block * size : end_token - first_block * size].contiguous().cpu()
        if self.dtype == torch.bfloat16:
            return kv.view(torch.int16).numpy().view(np.uint16)
        return kv.numpy()

    def write(self, layer: int, table: np.ndarray, first_token: int, kv: np.ndarray) -> None:
        """Put KV as `read` gives it at a sequence's tokens from `first_token` on."""
        size = self.layout.block_tokens
        tokens = np.arange(first_token, first_token + kv.shape[1])
        blocks = torch.as_tensor(table[tokens // size], device=self.device)
        offsets = torch.as_tensor(tokens % size, device=self.device)
        values = np.require(kv, requirements=["C", "W"])
        if self.dtype == torch.bfloat16:
            source = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        else:
            source = torch.from_numpy(values)
        # Advanced indices on both sides of the kept dimensions put tokens first: [n, 2, kv_heads, head_dim].
        self.layers[layer][blocks, :, :, offsets] = source.to(self.device).permute(1, 0, 2, 3)

    def blank(self, block: int, first_offset: int) -> None:
        """Zero what a former holder left in a block from an offset on: attention masks it, and NaN survives a mask."""
        for layer in self.layers:
            layer[block, :, :, first_offset:] = 0.0

    def wire_dtype(self) -> np.dtype:
        """The numpy type of `read` and `write`."""
        return np.dtype(np.uint16 if self.dtype == torch.bfloat16 else self.layout.dtype)


def _refuse_more_than_memory(layout: KvLayout, blocks: int, device: torch.device) -> None:
    needed = (blocks + 1) * layout.block_bytes
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > MEMORY_SHARE * free:
        raise InvalidConfig(
            f"kv_blocks {blocks} take {needed / 2**30:.1f} GiB, "
            f"above {MEMORY_SHARE:.0%} of the {free / 2**30:.1f} GiB free on {device}"
        )
