"""Sarathi-Serve (OSDI'24): capacity under a bound on the time between tokens, by chunks of prompts in a budget of tokens.

Capacity is the highest rate at which the 99th percentile of the time between tokens keeps its bound and the median request
waits less than 2 s to be begun, with at most 128 sequences at once and 2,048 requests. Against it: whole prompts beside decodes
(Orca) and whole prompts first (vLLM of that time). Bounds, budgets and gains are those noted of the paper; lengths are the
paper's own rows of ShareGPT, at most 8,192 tokens.

The paper's profile of attention is not at hand: step times are the roofline's, those of LLaMA2-70B Vidur's kernels with the
roofline's attention. A pipeline of two stages is two engines in parallel, each with the whole step time: that leaves out the
bubbles between unlike batches, which the paper says whole prompts suffer most from, so gains there come out too small.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from cluster.hardware import Accelerator, accelerator
from cluster.models import ModelShape, model_shape
from cluster.performance import roofline
from cluster.step_table import StepTable, step_table_of
from reproductions.capacity import highest_rate, quotient
from reproductions.engine_fleets import Colocated, EngineKind
from reproductions.kernel_steps import A40, kernel_table
from reproductions.published_lengths import SHAREGPT, Lengths, poisson, sampled
from reproductions.row import Row
from reproductions.settings import Settings
from simulator.steps.records import CHUNKED, PROMPTS_FIRST, WHOLE_PROMPTS

SYSTEM = "Sarathi-Serve"
REQUESTS, QUICK_REQUESTS = 2048, 192
PLACES = 128
MEDIAN_WAIT_S = 2.0
MOST_TOKENS = 8192
"""Of a step of whole prompts: the longest request."""
MEMORY_SHARE = 0.9
"""Of a device's memory that an engine takes, as vLLM does."""

YI_34B = ModelShape(
    name="yi-34b", layers=60, hidden=7168, heads=56, kv_heads=8, head_dim=128, intermediate=20_480, vocabulary=64_000
)
FALCON_180B = ModelShape(
    name="falcon-180b",
    layers=80,
    hidden=14_848,
    heads=232,
    kv_heads=8,
    head_dim=64,
    intermediate=4 * 14_848,
    vocabulary=65_024,
    gated=False,
    tied_embeddings=True,
)


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `derived/sarathi_capacity_slo.csv`."""

    shape: ModelShape
    device: Accelerator
    tensor: int
    stages: int
    strict_s: float
    relaxed_s: float
    relaxed_tokens: int
    gain: tuple[float, float]
    """The largest stated against Orca's and vLLM's batching."""

    @property
    def name(self) -> str:
        return f"{self.shape.name} on {self.tensor * self.stages} {self.device.name.upper()}"


STRICT_TOKENS = 512
DEPLOYMENTS = (
    Deployment(
        shape=model_shape("mistral-7b"),
        device=accelerator("a100-80g"),
        tensor=1,
        stages=1,
        strict_s=0.1,
        relaxed_s=0.5,
        relaxed_tokens=2048,
        gain=(2.6, 2.15),
    ),
    Deployment(
        shape=YI_34B,
        device=accelerator("a100-80g"),
        tensor=2,
        stages=1,
        strict_s=0.2,
        relaxed_s=1.0,
        relaxed_tokens=2048,
        gain=(4.0, 3.7),
    ),
    Deployment(
        shape=model_shape("llama-2-70b"),
        device=A40,
        tensor=4,
        stages=2,
        strict_s=1.0,
        relaxed_s=5.0,
        relaxed_tokens=1536,
        gain=(6.3, 4.3),
    ),
    Deployment(
        shape=FALCON_180B,
        device=accelerator("a100-80g"),
        tensor=4,
        stages=2,
        strict_s=1.0,
        relaxed_s=5.0,
        relaxed_tokens=2048,
        gain=(6.9, 5.6),
    ),
)


def rows(settings: Settings) -> Iterator[Row]:
    for deployment in DEPLOYMENTS[:2] if settings.quick else DEPLOYMENTS:
        settings.tell(deployment.name)
        yield from _capacities(settings, deployment)
    yield from _budgets(settings)
    yield from _chunk_costs(settings)
    yield from _ablation(settings)


# ── capacity ──


def _capacities(settings: Settings, of: Deployment) -> Iterator[Row]:
    """Under both bounds, against both ways of batching: no gain beyond the largest stated, and none below 1."""
    for word, bound_s, tokens in (("strict", of.strict_s, STRICT_TOKENS), ("relaxed", of.relaxed_s, of.relaxed_tokens)):
        ours = _capacity(settings, of, bound_s, tokens, CHUNKED)
        for system, batching, most in (("Orca", WHOLE_PROMPTS, of.gain[0]), ("vLLM", PROMPTS_FIRST, of.gain[1])):
            theirs = _capacity(settings, of, bound_s, MOST_TOKENS, batching)
            yield _row(
                claim=f"capacity of {of.name} against {system}, {word} bound (figure 10)",
                setting=f"P99 between tokens {bound_s:g} s, {tokens} tokens a step, ShareGPT",
                published=f"up to {most:g}x",
                ours=quotient(ours, theirs),
                unit="x",
                low=1.0,
                high=most * 1.1,
                tolerance="from no loss to 10 % above the largest gain stated",
                why=f"{ours:.3g} rps against {theirs:.3g}. " + (WHY_PIPELINED if of.stages > 1 else WHY_ROOFLINE),
            )


WHY_ROOFLINE = (
    "Where their capacity is 0, the bound is below what one step of whole prompts takes. Step times by roofline, which read "
    "weights faster than that engine did."
)
WHY_PIPELINED = (
    "Two stages are taken as two engines, without the bubbles of unlike batches that whole prompts suffer from. " + WHY_ROOFLINE
)


def _capacity(settings: Settings, of: Deployment, bound_s: float, tokens: int, batching: int) -> float:
    kind = _kind(settings, of, tokens, batching)
    lengths = _lengths(settings)

    def keeps(rate: float) -> bool:
        served = Colocated(poisson(lengths, rate, settings.seed), kind, of.stages).run()
        return served.gap_s(0.99) <= bound_s and float(np.median(served.waited_s)) < MEDIAN_WAIT_S

    return highest_rate(keeps, _first_guess(kind, lengths))


def _first_guess(kind: EngineKind, lengths: Lengths) -> float:
    """The rate at which prompts of mean length, in steps of their own, would keep an engine busy."""
    mean = int(lengths[:, 0].mean())
    return 1.0 / sum(
        kind.table.prefill_s(min(mean, done + kind.budget_tokens), done) for done in range(0, mean, kind.budget_tokens)
    )


def _budgets(settings: Settings) -> Iterator[Row]:
    """The trend over budgets: small ones under the strict bound, large ones under the relaxed."""
    of = DEPLOYMENTS[1]
    for word, bound_s, better, worse in (("strict", of.strict_s, 512, 2048), ("relaxed", of.relaxed_s, 2048, 512)):
        found = {tokens: _capacity(settings, of, bound_s, tokens, CHUNKED) for tokens in (256, 512, 1024, 2048)}
        told = ", ".join(f"{tokens}: {rate:.3g}" for tokens, rate in found.items())
        yield _row(
            claim=f"under the {word} bound {better} tokens a step carry more than {worse} (figure 12)",
            setting=f"{of.name}, P99 between tokens {bound_s:g} s, ShareGPT",
            published="> 1x",
            ours=quotient(found[better], found[worse]),
            unit="x",
            low=1.0,
            high=np.inf,
            tolerance="the direction",
            why=f"Capacity in rps by budget: {told}.",
        )


# ── what chunks cost ──

CHUNKED_PROMPT = 8192


def _chunk_costs(settings: Settings) -> Iterator[Row]:
    of = DEPLOYMENTS[1]
    table = _table(settings, of)
    whole_s = table.prefill_s(CHUNKED_PROMPT)
    for tokens, published, most in ((512, "at most 25 %", 25.0), (2048, "near 0", 5.0)):
        chunked_s = sum(table.prefill_s(done + tokens, done) for done in range(0, CHUNKED_PROMPT, tokens))
        yield _row(
            claim=f"what chunks of {tokens} tokens add to a prompt's time (section 5.4)",
            setting=f"{of.name}, a prompt of {CHUNKED_PROMPT} tokens alone",
            published=published,
            ours=100.0 * (chunked_s / whole_s - 1.0),
            unit="%",
            low=0.0,
            high=most,
            tolerance="an upper bound" if tokens == 512 else "5 %, for `near 0`",
            why="The roofline adds reading the weights to computing; kernels overlap them, so that chunks cost less than this.",
        )


# ── what each half of it gives ──


def _ablation(settings: Settings) -> Iterator[Row]:
    """At the rate that whole prompts beside decodes carry by waiting alone: the paper's own is not known."""
    of = DEPLOYMENTS[1]
    lengths = _lengths(settings)

    def waits(rate: float) -> bool:
        served = Colocated(poisson(lengths, rate, settings.seed), _kind(settings, of, MOST_TOKENS, WHOLE_PROMPTS)).run()
        return float(np.median(served.waited_s)) < MEDIAN_WAIT_S

    rate = 0.8 * highest_rate(waits, _first_guess(_kind(settings, of, MOST_TOKENS, WHOLE_PROMPTS), lengths))
    hybrid = Colocated(poisson(lengths, rate, settings.seed), _kind(settings, of, MOST_TOKENS, WHOLE_PROMPTS)).run()
    both = Colocated(poisson(lengths, rate, settings.seed), _kind(settings, of, 1024, CHUNKED)).run()
    setting = f"{of.name}, ShareGPT, 1,024 tokens a step, 0.8 of the rate at which the median waits 2 s for whole prompts"
    why = f"At {rate:.2f} rps: whole prompts {{}}, chunks {{}}. The rate of the paper's table is not known."
    ttfts = [float(np.median(each.ttft_s)) for each in (hybrid, both)]
    gaps = [each.gap_s(0.99) for each in (hybrid, both)]
    yield _row(
        claim="chunks beside decodes, median TTFT against whole prompts beside decodes (table 4)",
        setting=setting,
        published="0.76 s / 0.53 s = 1.43x",
        ours=ttfts[1] / ttfts[0],
        unit="x",
        low=1.0,
        high=2.0,
        tolerance="the direction, up to twice",
        why=why.format(*(f"{value:.2f} s" for value in ttfts)),
    )
    yield _row(
        claim="chunks beside decodes, P99 between tokens against whole prompts beside decodes (table 4)",
        setting=setting,
        published="0.14 s / 3.78 s = 0.037x",
        ours=gaps[1] / gaps[0],
        unit="x",
        low=0.0,
        high=0.2,
        tolerance="five times less at least",
        why=why.format(*(f"{value:.2f} s" for value in gaps))
        + " Their 3.78 s are several prompts in one step, a heavier load than ours.",
    )
    yield Row(
        system=SYSTEM,
        claim="chunks alone, without decodes beside them (table 4)",
        setting=setting,
        published="TTFT 1.04 s, P99 between tokens 0.17 s",
        ours=None,
        unit="s",
        label="predicted",
        depends_on_prefill=True,
        tolerance="",
        why="our engines have no batching of chunks that take turns with decodes",
    )


# ── engines ──


def _lengths(settings: Settings) -> Lengths:
    count = QUICK_REQUESTS if settings.quick else REQUESTS
    return sampled(settings.data_dir, SHAREGPT, count, settings.seed, MOST_TOKENS)


def _kind(settings: Settings, of: Deployment, tokens: int, batching: int) -> EngineKind:
    """One of its batches: all of a stage's time, and a stage's share of what holds KV."""
    room = MEMORY_SHARE * of.tensor * of.stages * of.device.memory_bytes - of.shape.weight_bytes()
    return EngineKind(
        table=_table(settings, of),
        kv_tokens=int(room / of.shape.kv_bytes_per_token() / of.stages),
        places=PLACES // of.stages,
        budget_tokens=tokens,
        batching=batching,
    )


def _table(settings: Settings, of: Deployment) -> StepTable:
    if of.device is A40:
        return kernel_table(settings.data_dir, of.shape.name, of.device.name, of.tensor, settings.prefill_cost)
    return step_table_of(roofline(of.shape, of.device, of.tensor)).stretched(prefill=settings.prefill_cost, decode=1.0)


def _row(
    *, claim: str, setting: str, published: str, ours: float | None, unit: str, low: float, high: float, tolerance: str, why: str
) -> Row:
    return Row(
        system=SYSTEM,
        claim=claim,
        setting=setting,
        published=published,
        ours=ours,
        unit=unit,
        label="predicted",
        depends_on_prefill=True,
        low=low,
        high=high,
        tolerance=tolerance,
        why=why,
    )
