"""Shapes of language models: what a decoder-only transformer weighs, and what a token of it costs to keep.

Catalogue entries are the published `config.json` of each model; `tests/cluster/test_models.py` holds their parameter counts
against the published ones.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import msgspec

from cluster.errors import InvalidConfig
from cluster.kv import DTYPE_BYTES


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder-only transformer by its dimensions."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of a dense feed-forward block; 0 where every layer is a mixture of experts."""
    vocabulary: int
    experts: int = 0
    """Routed experts a layer; 0 is dense."""
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0
    """Width of the expert every token visits; 0 without one."""
    tied_embeddings: bool = False
    gated: bool = True
    """Feed-forward of three matrices (SwiGLU), not two."""
    positions: int = 0
    """Learned position embeddings; 0 where positions are rotary."""
    biases: bool = False
    """Every projection and norm has a bias (OPT)."""
    qk_norm: bool = False
    """Queries and keys are normalised per head (Qwen3)."""
    embedding_norm: bool = False
    """Embeddings are normalised before the first layer (BLOOM)."""

    @property
    def attention_parameters(self) -> int:
        """Of one layer, its norm included."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = self.hidden * (queries + 2 * keys) + queries * self.hidden
        return weights + self.biases * (queries + 2 * keys + self.hidden) + self.qk_norm * 2 * self.head_dim + self._norm

    def feed_forward_parameters(self, experts: int) -> int:
        """Of one layer with so many routed experts, its norm and router included."""
        matrices = 3 if self.gated else 2
        dense = matrices * self.hidden * self.intermediate + self.biases * (self.intermediate + self.hidden) + self._norm
        if not self.experts:
            return dense
        routed = experts * matrices * self.hidden * self.expert_intermediate
        return routed + matrices * self.hidden * self.shared_intermediate + self.hidden * self.experts + self._norm

    def parameters(self) -> int:
        """All, embeddings included."""
        return self._embeddings + self._layers(self.experts) + (2 if self.embedding_norm else 1) * self._norm

    def matrix_parameters(self) -> int:
        """Active ones a token is multiplied with: two floating-point operations each. The input embedding is looked up."""
        return self._layers(self.experts_per_token) + self.vocabulary * self.hidden

    def weight_bytes(self, dtype: str = "bfloat16") -> int:
        return self.parameters() * DTYPE_BYTES[dtype]

    def kv_bytes_per_token(self, dtype: str = "bfloat16") -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[dtype]

    @property
    def _norm(self) -> int:
        return self.hidden * (1 + self.biases)

    @property
    def _embeddings(self) -> int:
        return self.hidden * (self.vocabulary * (1 if self.tied_embeddings else 2) + self.positions)

    def _layers(self, experts: int) -> int:
        return self.layers * (self.attention_parameters + self.feed_forward_parameters(experts))


def _llama(name: str, layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int) -> ModelShape:
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate=intermediate,
        vocabulary=vocabulary,
    )


def _qwen3(name: str, layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, *, tied: bool = False) -> ModelShape:
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        intermediate=intermediate,
        vocabulary=151_936,
        tied_embeddings=tied,
        qk_norm=True,
    )


def _qwen3_moe(name: str, layers: int, hidden: int, heads: int, kv_heads: int, expert_intermediate: int) -> ModelShape:
    dense = _qwen3(name, layers, hidden, heads, kv_heads, 0)
    return msgspec.structs.replace(dense, experts=128, experts_per_token=8, expert_intermediate=expert_intermediate)


def _mixtral(name: str, layers: int, hidden: int, heads: int, kv_heads: int, expert_intermediate: int, vocab: int) -> ModelShape:
    dense = _llama(name, layers, hidden, heads, kv_heads, 0, vocab)
    return msgspec.structs.replace(dense, experts=8, experts_per_token=2, expert_intermediate=expert_intermediate)


def _opt(name: str, layers: int, hidden: int, heads: int) -> ModelShape:
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        intermediate=4 * hidden,
        vocabulary=50_272,
        tied_embeddings=True,
        gated=False,
        positions=2050,
        biases=True,
    )


# Positions are a bias on attention scores (ALiBi), which has no parameters.
_BLOOM = ModelShape(
    name="bloom-176b",
    layers=70,
    hidden=14_336,
    heads=112,
    kv_heads=112,
    head_dim=128,
    intermediate=4 * 14_336,
    vocabulary=250_880,
    tied_embeddings=True,
    gated=False,
    biases=True,
    embedding_norm=True,
)

# The presets of `mobula model init`.
_TINY_DENSE = msgspec.structs.replace(_llama("tiny-dense", 3, 192, 6, 2, 512, 1024), tied_embeddings=True)
_TINY_MOE = msgspec.structs.replace(
    _TINY_DENSE, name="tiny-moe", intermediate=0, experts=8, experts_per_token=2, expert_intermediate=192, qk_norm=True
)

MODELS: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _llama("llama-2-7b", 32, 4096, 32, 32, 11_008, 32_000),
        _llama("llama-2-13b", 40, 5120, 40, 40, 13_824, 32_000),
        _llama("llama-2-70b", 80, 8192, 64, 8, 28_672, 32_000),
        _llama("llama-3.1-8b", 32, 4096, 32, 8, 14_336, 128_256),
        _llama("llama-3.1-70b", 80, 8192, 64, 8, 28_672, 128_256),
        _llama("llama-3.1-405b", 126, 16_384, 128, 8, 53_248, 128_256),
        _llama("mistral-7b", 32, 4096, 32, 8, 14_336, 32_000),
        _qwen3("qwen3-0.6b", 28, 1024, 16, 8, 3072, tied=True),
        _qwen3("qwen3-8b", 36, 4096, 32, 8, 12_288),
        _qwen3("qwen3-14b", 40, 5120, 40, 8, 17_408),
        _qwen3("qwen3-32b", 64, 5120, 64, 8, 25_600),
        _qwen3_moe("qwen3-30b-a3b", 48, 2048, 32, 4, 768),
        _qwen3_moe("qwen3-235b-a22b", 94, 4096, 64, 4, 1536),
        _mixtral("mixtral-8x7b", 32, 4096, 32, 8, 14_336, 32_000),
        _opt("opt-13b", 40, 5120, 40),
        _opt("opt-66b", 64, 9216, 72),
        _BLOOM,
        _TINY_DENSE,
        _TINY_MOE,
    )
}


def model_shape(name: str) -> ModelShape:
    """A shape of the catalogue. Raises InvalidConfig naming the nearest."""
    shape = MODELS.get(name)
    if shape is None:
        near = difflib.get_close_matches(name, MODELS, cutoff=0.4) or sorted(MODELS)
        raise InvalidConfig(f"model shape {name!r} is not known; near: {', '.join(near)}")
    return shape
