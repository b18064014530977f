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

from cluster.errors import InvalidConfig
from cluster.hardware import Accelerator
from cluster.models import ModelShape

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


# Shares of the data sheet reached, and seconds it does not know of; `roofline` says whence.
WEIGHT_SHARE = 0.93
KV_SHARE = 0.77
ATTENTION_SHARE = 0.15
COMPUTE_SHARE = {"a100-40g": 0.70, "a100-80g": 0.70}
DEFAULT_COMPUTE_SHARE = 0.53
STEP_S = 1.5e-3
LAYER_S = 19e-6
COLLECTIVES_S = 14e-6
SEQUENCE_S = 35e-6
DECODE_TDP_SHARE = 0.62
PREFILL_TDP_SHARE = 0.99


def roofline(shape: ModelShape, accelerator: Accelerator, tensor_parallel: int = 1) -> PerformanceModel:
    """A bfloat16 model on `tensor_parallel` accelerators, its terms added: weights and KV by bandwidth, tokens by compute.

    The shares of peak reached, and the fixed costs, are least squares of log error over measured runs:
    - decode: H100 (ml.energy, vLLM of 2025; dense Llama 3 and Qwen3, 8B to 70B, TP 1 to 4, batch 8 to 256): 0.93 of the
      bandwidth for weights, 0.77 for KV; 1.5 ms a step, 19 us a layer, 14 us a layer more with TP, 35 us a sequence.
    - prefill: of compute, 0.53 on H100 (Splitwise) and 0.70 on A100 (Splitwise, DistServe), attention scores 0.15; one
      prompt of 512 to 8192 tokens, TP 1 to 4. Devices without measurements take H100's.
    - power: 0.62 of TDP where weights are read for few, 0.99 for what grows, on H100.

    | measured                                  | points | mean error | largest |
    |-------------------------------------------|--------|------------|---------|
    | decode, dense on H100 (fitted)            |     64 |        5 % |    17 % |
    | prefill, Llama-2-70B on H100 (fitted)     |     10 |       12 % |    24 % |
    | prefill, Llama-2-70B, OPT on A100 (fitted)|     28 |        9 % |    25 % |
    | decode power, dense on H100 (fitted)      |     77 |        5 % |    20 % |
    | decode, OPT on A100 (DistServe)           |     56 |       22 % |    48 % |
    | decode, dense on B200                     |     59 |       26 % |    84 % |
    | decode, Qwen3 MoE on H100                 |     33 |       26 % |    95 % |

    The last three are predictions. Mixtures of experts read all experts in every step, too much at batch 8 and below; engines
    of 2023 were slower than the bound (Splitwise's A100 decode by half). Raises InvalidConfig where heads do not divide.
    """
    if tensor_parallel < 1 or shape.heads % tensor_parallel:
        raise InvalidConfig(f"tensor_parallel {tensor_parallel} does not divide {shape.heads}, the heads of {shape.name}")
    many, compute = tensor_parallel, COMPUTE_SHARE.get(accelerator.name, DEFAULT_COMPUTE_SHARE)
    rate, bandwidth = many * accelerator.flops, accelerator.bandwidth_bytes_s
    # Two all-reduces a layer of a bfloat16 vector, ring: 2 (n - 1) / n of it over each device's link, one direction.
    exchanged_bytes = 2 * shape.layers * shape.hidden * 2 * 2 * (many - 1) / many
    token_s = 2 * shape.matrix_parameters() / (rate * compute) + exchanged_bytes / (accelerator.link_bytes_s / 2)
    layer_s = LAYER_S + (COLLECTIVES_S if many > 1 else 0.0)
    return PerformanceModel(
        step_s=STEP_S + shape.layers * layer_s + shape.weight_bytes() / (many * bandwidth * WEIGHT_SHARE),
        prefill_token_s=token_s,
        prefill_pair_s=4 * shape.layers * shape.heads * shape.head_dim / (rate * ATTENTION_SHARE),
        sequence_s=token_s + SEQUENCE_S,
        # Beyond one device a KV head, heads are copied rather than split.
        kv_token_s=shape.kv_bytes_per_token() / (min(many, shape.kv_heads) * bandwidth * KV_SHARE),
        idle_w=many * accelerator.idle_w,
        prefill_w=many * accelerator.tdp_w * PREFILL_TDP_SHARE,
        decode_w=many * accelerator.tdp_w * DECODE_TDP_SHARE,
    )
