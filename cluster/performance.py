"""How long a step takes and how many watts it draws: placeholder until the roofline lands beside it."""

from __future__ import annotations

import msgspec


class PerformanceModel(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds and watts of one replica, from the features of a step.

    A step that computes `p` prompt tokens, attending to `a` (token, context) pairs, and one token each for `b` decoding
    sequences with `k` KV tokens in all lasts
        step_s + p * prefill_token_s + a * prefill_pair_s + b * sequence_s + k * kv_token_s.
    All coefficients are seconds, >= 0, and `step_s` > 0 unless everything is 0 (an engine without pace).
    """

    step_s: float
    prefill_token_s: float
    prefill_pair_s: float = 0.0
    sequence_s: float = 0.0
    kv_token_s: float = 0.0
    idle_w: float = 0.0
    prefill_w: float = 0.0
    decode_w: float = 0.0
