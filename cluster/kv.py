"""KV blocks: what one is, how long it is, and the hash that says two are the same.

A block is a run of `block_tokens` tokens' keys and values. Its hash chains over the whole prefix inside a namespace,
so that equal hashes mean equal prefixes of the same model, adapter, tenant salt and dtype. The hash is 64 bits and not
cryptographic: an engine compares token ids before it trusts a hit.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import msgspec
import numpy as np
import xxhash

BLOCK_TOKENS = 16  # vLLM's default as well: small enough to share, large enough to index.

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


class KvNamespace(msgspec.Struct, frozen=True, kw_only=True):
    """Inside which prefixes may be shared."""

    model: str
    revision: str = ""
    adapter: str = ""
    salt: str = ""
    dtype: str = "float32"
    block_tokens: int = BLOCK_TOKENS

    def root(self) -> int:
        """The hash that the first block chains from."""
        return xxhash.xxh3_64_intdigest(msgspec.msgpack.encode(self))


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """How a model's KV lies in bytes. A transfer carries it, and the receiver refuses another."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"
    block_tokens: int = BLOCK_TOKENS

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of one token's key and value in one layer."""
        return 2 * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return self.layers * self.layer_token_bytes

    @property
    def block_bytes(self) -> int:
        return self.block_tokens * self.token_bytes


def blocks_for(tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """Blocks that hold `tokens` tokens, the last perhaps in part."""
    return -(-tokens // block_tokens)


def block_hashes(tokens: Sequence[int], namespace: KvNamespace) -> list[int]:
    """Chained hashes of the full blocks of a token sequence, first block first.

    hash[i] = xxh3_64(tokens of block i as int32, seed = hash[i - 1]), hash[-1] = namespace.root().
    """
    size = namespace.block_tokens
    data = memoryview(np.asarray(tokens, dtype=np.int32).tobytes())
    stride = 4 * size
    digest = xxhash.xxh3_64_intdigest
    chained, hashes = namespace.root(), []
    for start in range(0, len(data) - stride + 1, stride):
        chained = digest(data[start : start + stride], chained)
        hashes.append(chained)
    return hashes


def next_block_hash(parent: int, tokens: Sequence[int]) -> int:
    """Hash of one full block after the block (or namespace root) of hash `parent`: `block_hashes`, a block at a time."""
    return int(xxhash.xxh3_64_intdigest(array("i", tokens).tobytes(), parent))


class KvStored(msgspec.Struct, frozen=True, kw_only=True, tag="stored"):
    """Blocks a replica now holds and may share. Token ids come along, so that engines with other hashes can be indexed."""

    parent: int | None
    """Hash of the block before the first of these; None at the start of a prompt."""
    hashes: tuple[int, ...]
    tokens: tuple[int, ...]
    block_tokens: int = BLOCK_TOKENS


class KvRemoved(msgspec.Struct, frozen=True, kw_only=True, tag="removed"):
    """Blocks a replica has evicted."""

    hashes: tuple[int, ...]


class KvCleared(msgspec.Struct, frozen=True, kw_only=True, tag="cleared"):
    """The replica has forgotten all its blocks; what follows is a complete picture."""


KvEvent = KvStored | KvRemoved | KvCleared
