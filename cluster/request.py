"""What a client asks for: a prompt, how to sample, and on whose behalf."""

from __future__ import annotations

import math

import msgspec

from cluster.errors import InvalidRequest

MAX_STOP_STRINGS = 16  # OpenAI allows 4; open servers more. Each is searched after every token.
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_TOP_LOGPROBS = 20  # OpenAI's own bound.
MIN_REPETITION_PENALTY = 0.01  # Logits are divided by it, and must stay finite.
MAX_SEED = 2**63 - 1
MAX_PRIORITY = 100  # Either way of 0; more steps than anybody tells apart.


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen. `check` gives every range."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """How many alternatives to report beside each token's own log-probability; None reports nothing."""

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def check(self) -> None:
        """Raise InvalidRequest for the first field out of its range."""
        _within("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_p", self.top_p, 0.0, 1.0, above_low=True)
        if self.top_k is not None:
            _within("top_k", self.top_k, 1, 2**31 - 1)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, 10.0)
        _within("seed", self.seed, -MAX_SEED, MAX_SEED)
        if self.logprobs is not None:
            _within("top_logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        _within("stop (number of strings)", len(self.stop), 0, MAX_STOP_STRINGS)
        for text in self.stop:
            _within("stop (characters)", len(text), 1, MAX_STOP_CHARS)
        _within("stop_token_ids (number)", len(self.stop_token_ids), 0, MAX_STOP_TOKEN_IDS)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted generation request. Token ids, not text: only the gateway has seen the text."""

    request_id: str
    model: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    tenant: str = "default"
    priority: int = 0
    """Higher goes first."""
    slo_class: str = "default"
    arrival_s: float = 0.0
    """Unix time at the gateway."""
    deadline_s: float | None = None
    """Unix time after which nobody wants the first token: what has not generated it then is ended. None waits for ever."""
    salt: str = ""
    """Keeps this tenant's KV blocks apart from others' (`cluster.kv.KvNamespace`)."""


def _within(name: str, value: float, low: float, high: float, *, above_low: bool = False) -> None:
    if not math.isfinite(value) or value > high or value < low or (above_low and value == low):
        bracket = "(" if above_low else "["
        raise InvalidRequest(f"{name} {value} is outside {bracket}{low}, {high}]", param=name.split(" ")[0])
