"""Paged attention: a step's tokens, of many sequences, in one row, each attending to its own blocks.

`StepAttention` turns block tables into index tensors once a step; `paged_attention` uses them in every layer. Sequences that
compute one token are attended together, in groups of like length, by two batched products in which the query heads that
share a key head are rows of one matrix, so that no key is copied per query head. Longer chunks go through
scaled_dot_product_attention one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from workers.engines.torch_engine.kv_tensors import KvTensors

IMPLEMENTATION = "mobula_paged"

SPLIT_TOKENS = 256  # Launching one more group costs about as much as attending to so many tokens of padding.


class Span(NamedTuple):
    """What one sequence computes in a step: tokens [start, start + count), found through its block table."""

    table: np.ndarray
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


class _Group(NamedTuple):
    """Sequences of one token each that are attended together."""

    rows: slice
    blocks: torch.Tensor
    """Indices into KvTensors.block_rows, shape [2 * sequences * kv_heads * blocks]."""
    context: int
    mask: torch.Tensor | None
    """[sequences * kv_heads, 1, context], 0 or -inf; None where all are equally long."""


class _Chunk(NamedTuple):
    """Several tokens of one sequence."""

    rows: slice
    blocks: torch.Tensor | None
    """None where nothing precedes the chunk: it then attends to itself alone."""
    context: int
    mask: torch.Tensor | None
    """[count, context], 0 or -inf."""


class StepAttention:
    """Where a step's tokens write and read. `spans` has sequences of one token first, the longest context first."""

    def __init__(self, kv: KvTensors, spans: Sequence[Span], on_layer: Callable[[int], None] | None = None) -> None:
        self.kv = kv
        self.on_layer = on_layer
        """Called with each layer's index as soon as its keys and values are written."""
        self.positions = np.concatenate([np.arange(span.start, span.end) for span in spans])
        self._written = self._token_rows(spans)
        self._begun = self._begun_blocks(spans)
        singles = next((i for i, span in enumerate(spans) if span.count > 1), len(spans))
        self._groups = [self._group(first, spans[first:end]) for first, end in _split(spans[:singles])]
        self._chunks, row = [], singles
        for span in spans[singles:]:
            self._chunks.append(self._chunk(row, span))
            row += span.count

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """key, value: [1, kv_heads, tokens, head_dim]."""
        if self._begun is not None:
            self.kv.layers[layer].index_fill_(0, self._begun, 0.0)
        source = torch.cat((key, value)).view(-1, self.kv.layout.head_dim)
        self.kv.token_rows[layer].index_copy_(0, self._written, source)
        if self.on_layer is not None:
            self.on_layer(layer)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """query: [1, heads, tokens, head_dim]. Returns [1, tokens, heads, head_dim]."""
        rows = query[0].transpose(0, 1)
        parts = [self._attend_group(group, layer, rows, scaling) for group in self._groups]
        parts += [self._attend_chunk(chunk, layer, query, key, value, scaling) for chunk in self._chunks]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)

    def _attend_group(self, group: _Group, layer: int, rows: torch.Tensor, scaling: float) -> torch.Tensor:
        heads, head_dim = rows.shape[1:]
        kv_heads = self.kv.layout.kv_heads
        keys, values = self._gather(layer, group.blocks, group.context)
        query = rows[group.rows].reshape(len(keys), heads // kv_heads, head_dim)
        if group.mask is None:
            scores = torch.bmm(query * scaling, keys.transpose(1, 2))
        else:
            scores = torch.baddbmm(group.mask, query, keys.transpose(1, 2), alpha=scaling)
        return torch.bmm(torch.softmax(scores, dim=-1), values).view(-1, heads, head_dim)

    def _attend_chunk(
        self, chunk: _Chunk, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        query, grouped = query[:, :, chunk.rows], query.shape[1] != key.shape[1]
        if chunk.blocks is None:
            keys, values = key[:, :, chunk.rows], value[:, :, chunk.rows]
        else:
            keys, values = self._gather(layer, chunk.blocks, chunk.context).unsqueeze(1)
        attended = scaled_dot_product_attention(
            query, keys, values, attn_mask=chunk.mask, is_causal=chunk.mask is None, scale=scaling, enable_gqa=grouped
        )
        return attended[0].transpose(0, 1)

    def _gather(self, layer: int, blocks: torch.Tensor, context: int) -> torch.Tensor:
        """[2, sequences * kv_heads, context, head_dim]."""
        layout = self.kv.layout
        blocks_per_row = -(-context // layout.block_tokens)
        gathered = self.kv.block_rows[layer].index_select(0, blocks)
        return gathered.view(2, -1, blocks_per_row * layout.block_tokens, layout.head_dim)[:, :, :context]

    def _token_rows(self, spans: Sequence[Span]) -> torch.Tensor:
        """Rows of KvTensors.token_rows for [2, kv_heads, tokens]."""
        layout = self.kv.layout
        size = layout.block_tokens
        blocks = np.concatenate([span.table[np.arange(span.start, span.end) // size] for span in spans])
        first = blocks * (2 * layout.kv_heads * size) + self.positions % size
        rows = np.arange(2 * layout.kv_heads)[:, None] * size + first[None, :]
        return self._tensor(rows.reshape(-1))

    def _begun_blocks(self, spans: Sequence[Span]) -> torch.Tensor | None:
        """Blocks that the step begins and does not fill. The rest of one is masked, but what a former holder left there may
        be NaN or infinite, and that survives a mask: it is blanked."""
        size = self.kv.layout.block_tokens
        begun = [span.table[span.end // size] for span in spans if span.end % size and span.start <= span.end // size * size]
        return self._tensor(np.array(begun)) if begun else None

    def _block_rows(self, tables: np.ndarray) -> torch.Tensor:
        """Rows of KvTensors.block_rows for [2, sequences, kv_heads, blocks], of block tables [sequences, blocks]."""
        heads = np.arange(2 * self.kv.layout.kv_heads).reshape(2, 1, -1, 1)
        return self._tensor((tables[None, :, None, :] * heads.size + heads).reshape(-1))

    def _group(self, first_row: int, spans: Sequence[Span]) -> _Group:
        context, kv_heads = spans[0].end, self.kv.layout.kv_heads
        tables = np.full((len(spans), -(-context // self.kv.layout.block_tokens)), self.kv.padding)
        for row, span in zip(tables, spans, strict=True):
            blocks = -(-span.end // self.kv.layout.block_tokens)
            row[:blocks] = span.table[:blocks]
        mask = None
        if spans[-1].end < context:
            visible = np.arange(context)[None, :] < np.array([span.end for span in spans])[:, None]
            mask = self._mask(visible).repeat_interleave(kv_heads, 0).unsqueeze(1)
        return _Group(slice(first_row, first_row + len(spans)), self._block_rows(tables), context, mask)

    def _chunk(self, first_row: int, span: Span) -> _Chunk:
        rows = slice(first_row, first_row + span.count)
        if span.start == 0:
            return _Chunk(rows, None, span.end, None)
        blocks = span.table[None, : -(-span.end // self.kv.layout.block_tokens)]
        visible = np.arange(span.end)[None, :] <= np.arange(span.start, span.end)[:, None]
        return _Chunk(rows, self._block_rows(blocks), span.end, self._mask(visible))

    def _mask(self, visible: np.ndarray) -> torch.Tensor:
        mask = torch.zeros(visible.shape, dtype=self.kv.dtype, device=self.kv.device)
        return mask.masked_fill_(~self._tensor(visible), float("-inf"))

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.kv.device)


def _split(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """Bounds of groups of sequences, longest first, in which padding stays below SPLIT_TOKENS each."""
    bounds, first, padding = [], 0, 0
    for i, span in enumerate(spans):
        padding += spans[first].end - span.end
        if padding > SPLIT_TOKENS:
            bounds.append((first, i))
            first, padding = i, 0
    if spans:
        bounds.append((first, len(spans)))
    return bounds


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged_step: StepAttention,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """What `transformers` calls in every layer, in place of its own attention."""
    layer = module.layer_idx
    paged_step.write(layer, key, value)
    return paged_step.attend(layer, query, key, value, scaling or query.shape[-1] ** -0.5), None


AttentionInterface.register(IMPLEMENTATION, paged_attention)
AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)
