"""How long a step takes and how many watts it draws, as a function of what the step computes. Pure arithmetic.

One affine form serves the emulated engine, pacing, the routers' predictions and the simulator, so that they agree. It is what
DistServe fits per model (prefill: constant, tokens, tokens squared; decode: constant, context, batch; OSDI'24, appendix A) and
what a roofline with additive terms gives. What it leaves out: step times that bend (a cache that fills, kernels that change
with batch size) and, for mixtures of experts, that small batches touch few experts.

Power is interpolated by time: the fixed part of a step (weights streamed for few tokens) draws `decode_w`, all that grows with
tokens, batch and context draws `prefill_w`. Decode power is therefore concave in the batch, as measured on H100 (70B, 441 W at
batch 8 to 623 W at 512), and prompts run near TDP, as measured on A100 (Splitwise, ISCA'24; POLCA, ASPLOS'24).
"""

from __future__ import annotations

import math

import msgspec

MAX_STEPS = 2**31 - 1  # `decode_steps_within` of a model without pace; no output is longer.


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

    def step_time_s(self, prefill_tokens: int, prefill_pairs: int, sequences: int, kv_tokens: int) -> float:
        """Seconds of one step. `prefill_pairs`: see `causal_pairs`; `kv_tokens`: summed over the decoding sequences."""
        return (
            self.step_s
            + prefill_tokens * self.prefill_token_s
            + prefill_pairs * self.prefill_pair_s
            + sequences * self.sequence_s
            + kv_tokens * self.kv_token_s
        )

    def prefill_s(self, tokens: int, cached_tokens: int = 0) -> float:
        """Seconds to compute a prompt of `tokens`, of which the first `cached_tokens` have their KV, in one step."""
        return self.step_time_s(tokens - cached_tokens, causal_pairs(cached_tokens, tokens - cached_tokens), 0, 0)

    def decode_step_s(self, batch: int, kv_tokens: int) -> float:
        """Seconds of one decode step; affine in `kv_tokens` for a given batch."""
        return self.step_time_s(0, 0, batch, kv_tokens)

    def decode_span_s(self, batch: int, kv_tokens: int, steps: int) -> float:
        """Seconds of `steps` decode steps in a row; each leaves `batch` more KV tokens to the next."""
        return steps * self.decode_step_s(batch, kv_tokens) + (steps * (steps - 1) // 2) * (batch * self.kv_token_s)

    def decode_steps_within(self, batch: int, kv_tokens: int, seconds: float) -> int:
        """Most steps whose `decode_span_s` is at most `seconds` >= 0; never above MAX_STEPS."""
        first, growth = self.decode_step_s(batch, kv_tokens), batch * self.kv_token_s
        if first == 0.0:
            return MAX_STEPS
        # The positive root of growth/2 n^2 + linear n = seconds, in whichever form does not cancel.
        linear = first - growth / 2
        discriminant = math.sqrt(linear * linear + 2 * growth * seconds)
        root = 2 * seconds / (linear + discriminant) if linear > 0.0 else (discriminant - linear) / growth
        steps = math.floor(min(root, MAX_STEPS))
        while steps > 0 and self.decode_span_s(batch, kv_tokens, steps) > seconds:
            steps -= 1
        while steps < MAX_STEPS and self.decode_span_s(batch, kv_tokens, steps + 1) <= seconds:
            steps += 1
        return steps

    def power_w(self, prefill_tokens: int, prefill_pairs: int, sequences: int, kv_tokens: int) -> float:
        """Watts during such a step; `idle_w` where it computes nothing."""
        if prefill_tokens == 0 and sequences == 0:
            return self.idle_w
        lasting = self.step_time_s(prefill_tokens, prefill_pairs, sequences, kv_tokens)
        fixed = self.step_s / lasting if lasting > 0.0 else 0.0
        return self.prefill_w + fixed * (self.decode_w - self.prefill_w)

    def scaled(self, speedup: float) -> PerformanceModel:
        """The same machine `speedup` > 0 times as fast, at the same watts."""
        return PerformanceModel(
            step_s=self.step_s / speedup,
            prefill_token_s=self.prefill_token_s / speedup,
            prefill_pair_s=self.prefill_pair_s / speedup,
            sequence_s=self.sequence_s / speedup,
            kv_token_s=self.kv_token_s / speedup,
            idle_w=self.idle_w,
            prefill_w=self.prefill_w,
            decode_w=self.decode_w,
        )


def causal_pairs(context_tokens: int, tokens: int) -> int:
    """(token, context) pairs of `tokens` new tokens after `context_tokens`: each attends to all before it and itself."""
    return tokens * context_tokens + tokens * (tokens + 1) // 2
