"""How many replicas a flow needs under its SLO: queueing for the first token, batching for the others.

Prefill is a queue of `n` servers: a request waits with Erlang's probability C, and then for an exponential time of mean
(ca2 + cs2) / 2 / (n / s - rate), Kingman's heavy-traffic law carried to n servers (Allen and Cunneen; Whitt, "Approximating the
GI/G/m queue", 1993). Decode is a batch that feeds itself: by Little's law a replica holds `rate x output x step` sequences, whose
number lengthens the step. Their number swings like a Poisson variable, so the bounds are asked of its upper quantile. Every
condition is monotone in the rate and in `n`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from cluster.performance import PerformanceModel
from cluster.ranges import at_least, share
from cluster.slo import Slo
from cluster.snapshot import Group
from policies.flow import Flow

MAX_REPLICAS = 10_000
FLOOR_SHARE = 0.8
NEGLIGIBLE = 1e-17  # Of a sum in double precision.


class Bounds(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How safe is safe."""

    missed_share: float = 0.01
    """Share of requests that may miss TTFT by waiting: the field judges by P99."""
    utilisation: float = 0.85
    """Busy share of a prefill replica, at most: beyond it a small error of the model is a long queue."""
    kv_share: float = 0.9
    """Of the KV capacity: preemption begins at 1, and block rounding takes some."""
    batch_sigmas: float = 2.33
    """Upper quantile of the batch, and of what prompts beside it stretch an answer by, 99 %."""
    length_sigmas: float = 1.64
    """The prompt whose own computation must fit into TTFT: the 95th percentile of a normal length."""

    def __post_init__(self) -> None:
        share(missed_share=self.missed_share, utilisation=self.utilisation, kv_share=self.kv_share)
        at_least(0.0, batch_sigmas=self.batch_sigmas, length_sigmas=self.length_sigmas)


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """Whether `replicas` carry a flow, and by what they are bound."""

    holds: bool
    binding: str
    """The condition nearest to its bound, or furthest beyond."""
    use: float
    """Its value over its bound; above 1 it does not hold."""


Fits = Callable[[int], Fit]
IDLE = Fit(holds=True, binding="nothing arrives", use=0.0)
NOBODY = Fit(holds=False, binding="no replica", use=math.inf)


def prefill_fits(group: Group, flow: Flow, slo: Slo, bounds: Bounds, replicas: int) -> Fit:
    """Whether so many replicas, which do nothing but prefill, carry the flow."""
    return _first_token_fits(group, flow, slo, bounds, replicas, decode_step_s=0.0)


def decode_fits(group: Group, flow: Flow, slo: Slo, bounds: Bounds, replicas: int, *, prefilling: bool) -> Fit:
    """Whether so many replicas carry the flow's decoding; with `prefilling` its prompts as well."""
    if flow.rate_rps <= 0.0:
        return IDLE
    if replicas <= 0:
        return NOBODY
    performance = measured(group)
    tokens_rate = flow.rate_rps / replicas * flow.output_tokens
    context = flow.context_tokens + flow.output_tokens / 2
    sequence_s = performance.sequence_s + context * performance.kv_token_s
    prefill_share = flow.rate_rps / replicas * _service_s(performance, flow.prompt_tokens, math.inf) if prefilling else 0.0
    left = 1.0 - prefill_share - tokens_rate * sequence_s
    if left <= 0.0:
        return Fit(holds=False, binding="saturation", use=math.inf)
    batch = tokens_rate * performance.step_s / left
    peak = batch + bounds.batch_sigmas * math.sqrt(batch)
    step_s = performance.step_s + peak * sequence_s
    held = flow.context_tokens + flow.output_tokens
    conditions = {
        "batch": peak / group.max_running,
        "KV capacity": peak * held / (bounds.kv_share * group.kv_tokens),
        "saturation": (1.0 - left) / bounds.utilisation,
    }
    if slo.tpot_s is not None:
        conditions["TPOT"] = step_s / (slo.tpot_s * (1.0 - prefill_share))
    if slo.tpot_s is not None and prefilling and flow.output_tokens > 0.0:
        answer_s = flow.output_tokens * (performance.step_s + batch * sequence_s)
        spread_s = bounds.batch_sigmas * _stretch_sd_s(performance, flow, replicas, answer_s, prefill_share)
        conditions["TPOT beside prompts"] = (answer_s / (1.0 - prefill_share) + spread_s) / (flow.output_tokens * slo.tpot_s)
    fit = _nearest(conditions)
    if not prefilling or not fit.holds:
        return fit
    first = _first_token_fits(group, flow, slo, bounds, replicas, decode_step_s=step_s - performance.step_s)
    return first if first.use > fit.use else fit


def smallest(fits: Fits) -> int:
    """The least number for which it fits, at most MAX_REPLICAS, where it is said to fit whatever it does."""
    high = 1
    if fits(0).holds:
        return 0
    while high < MAX_REPLICAS and not fits(high).holds:
        high *= 2
    low, high = high // 2, min(high, MAX_REPLICAS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle).holds else (middle, high)
    return high


def measured(group: Group) -> PerformanceModel:
    """The model's step times, corrected by what was measured. Only of groups whose replicas are known."""
    assert group.performance is not None, group.name
    return group.performance.scaled(1.0 / group.slowdown)


def erlang_c(servers: int, offered: float) -> float:
    """Probability of waiting in M/M/n, for an offered load in [0, servers) (Erlang, 1917).

    By the reciprocal of Erlang's B, the sum of n! / k! / offered^(n - k) from k = n down: its terms die out long before k = 0.
    """
    if offered <= 0.0:
        return 0.0
    term = ways = 1.0
    for server in range(servers, 0, -1):
        term *= server / offered
        ways += term
        if term < ways * NEGLIGIBLE:
            break
    busy = offered / servers
    return 1.0 / (ways * (1.0 - busy) + busy)


def _first_token_fits(group: Group, flow: Flow, slo: Slo, bounds: Bounds, replicas: int, decode_step_s: float) -> Fit:
    """`decode_step_s`: what each step lasts longer for the decodes that share it.

    Where even an idle replica computes a long prompt in more than `FLOOR_SHARE` of TTFT, no number of replicas is the answer, and
    utilisation alone says how many carry the load.
    """
    if flow.rate_rps <= 0.0:
        return IDLE
    if replicas <= 0:
        return NOBODY
    performance = measured(group)
    budget = group.step_budget_tokens - (group.max_running if decode_step_s else 0)
    chunk = max(1, budget)

    def service_s(tokens: float) -> float:
        return _service_s(performance, tokens, chunk) + math.ceil(tokens / chunk) * decode_step_s

    mean_s = service_s(flow.prompt_tokens)
    offered = flow.rate_rps * mean_s
    conditions = {"utilisation": offered / (bounds.utilisation * replicas)}
    if slo.ttft_s is not None and offered < replicas:
        long = flow.prompt_tokens + bounds.length_sigmas * flow.prompt_tokens_sd
        if _service_s(performance, long, chunk) <= FLOOR_SHARE * slo.ttft_s:
            slack_s = max(0.0, slo.ttft_s - service_s(long))
            variation = (performance.prefill_token_s * flow.prompt_tokens_sd / mean_s) ** 2
            decay = 2.0 / (flow.dispersion + variation) * (replicas / mean_s - flow.rate_rps)
            conditions["TTFT"] = erlang_c(replicas, offered) * math.exp(-decay * slack_s) / bounds.missed_share
    return _nearest(conditions)


def _stretch_sd_s(performance: PerformanceModel, flow: Flow, replicas: int, answer_s: float, prefill_share: float) -> float:
    """Standard deviation of what prompts that come in between stretch an answer by, which takes `answer_s` alone.

    A busy period that begins with the answer: its variance is rate x E[s^2] x answer / (1 - busy)^3, s being a prompt's service
    (Conway, Maxwell and Miller, "Theory of Scheduling", 1967, 8-3), times the dispersion of the arrivals.
    """
    mean_s = _service_s(performance, flow.prompt_tokens, math.inf)
    square = mean_s * mean_s + (performance.prefill_token_s * flow.prompt_tokens_sd) ** 2
    return math.sqrt(flow.dispersion * flow.rate_rps / replicas * square * answer_s / (1.0 - prefill_share) ** 3)


def _service_s(performance: PerformanceModel, tokens: float, chunk: float) -> float:
    """Seconds to compute a prompt in steps of `chunk` tokens; with an infinite chunk, in steps that run anyway."""
    pairs = tokens * (tokens + 1.0) / 2.0
    steps = 0.0 if math.isinf(chunk) else max(1.0, tokens / chunk)
    return steps * performance.step_s + tokens * performance.prefill_token_s + pairs * performance.prefill_pair_s


def _nearest(conditions: dict[str, float]) -> Fit:
    binding = max(conditions, key=lambda name: conditions[name])
    return Fit(holds=conditions[binding] <= 1.0, binding=binding, use=conditions[binding])
