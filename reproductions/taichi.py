"""TaiChi (arXiv 2508.01989): where prompts and decoding on the same engines win, and where on engines of their own.

Published for three pairs of bounds on TTFT and TPOT: the share of requests within both, aggregated and disaggregated. The
setting is known at second hand: Llama-2-70B on 32 A100 in eight engines of TP 4, arXiv summaries at 12 requests per second,
simulated with Vidur. Ours takes Vidur's kernel profiles and its rows of arXiv summaries, which it cut at 4,096 tokens. The size
of chunks and the split into prefill and decode engines are not known. Each side is set up once, as an operator would who must
choose one: with the chunks, or the split, that keep most requests within the bounds of the middle pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from cluster.hardware import accelerator
from cluster.models import model_shape
from reproductions.engine_fleets import Colocated, Disaggregated, EngineKind, Served
from reproductions.kernel_steps import kernel_table
from reproductions.published_lengths import ARXIV_4K, MOST, poisson, sampled
from reproductions.row import Row
from reproductions.settings import Settings
from simulator.steps.records import WHOLE_PROMPTS

MODEL, DEVICE, TENSOR, ENGINES = "llama-2-70b", "a100-80g", 4, 8
RATE = 12.0
"""Requests per second: published, at second hand."""
CHUNKS = (512, 1024, 2048)
MEMORY_SHARE = 0.9
"""Of a device's memory that an engine takes, as vLLM does."""
NVLINK_BYTES_S = 300e9
"""One direction; disaggregated pairs are taken to share a machine."""


class Point(NamedTuple):
    """Bounds in seconds, and the published shares within them, in percent."""

    ttft_s: float
    tpot_s: float
    aggregated: float
    disaggregated: float


POINTS = (Point(16.0, 0.06, 7.0, 98.0), Point(5.0, 0.25, 97.0, 42.0), Point(6.0, 0.1, 16.0, 50.0))
MIDDLE = POINTS[2]


def rows(settings: Settings) -> Iterator[Row]:
    settings.tell("chunks")
    aggregated = _best(_aggregated(settings))
    settings.tell("splits")
    disaggregated = _best(_disaggregated(settings))
    for point in POINTS:
        yield _row(settings, point, aggregated, disaggregated)


def _row(settings: Settings, point: Point, one: tuple[str, Served], other: tuple[str, Served]) -> Row:
    shares = [100.0 * served.attainment(point.ttft_s, point.tpot_s) for _, served in (one, other)]
    wins = point.disaggregated > point.aggregated
    return Row(
        system="TaiChi",
        claim=f"{'disaggregated' if wins else 'aggregated'} keeps more within TTFT {point.ttft_s:g} s and TPOT "
        f"{1e3 * point.tpot_s:g} ms",
        setting="Llama-2-70B, 8 engines of 4 A100 by Vidur's kernels, arXiv summaries to 4,096 tokens, 12 rps",
        published=f"{point.disaggregated:g} - {point.aggregated:g} = {point.disaggregated - point.aggregated:+g} points",
        ours=shares[1] - shares[0],
        unit="points",
        label="predicted",
        depends_on_prefill=True,
        low=0.0 if wins else -100.0,
        high=100.0 if wins else 0.0,
        tolerance="which of them wins",
        why=f"Disaggregated ({other[0]}) {shares[1]:.0f} %, aggregated ({one[0]}) {shares[0]:.0f} %. Chunks and split of the "
        f"paper are not known, and attention is the roofline's.",
    )


def _best(found: Iterator[tuple[str, Served]]) -> tuple[str, Served]:
    """The one that keeps most within the middle bounds; of equals, that with the shorter wait for a first token."""
    return max(found, key=lambda one: (one[1].attainment(MIDDLE.ttft_s, MIDDLE.tpot_s), -float(one[1].ttft_s.mean())))


def _aggregated(settings: Settings) -> Iterator[tuple[str, Served]]:
    for tokens in CHUNKS:
        kind = msgspec.structs.replace(_kind(settings), budget_tokens=tokens)
        yield f"chunks of {tokens}", Colocated(_jobs(settings), kind, ENGINES).run()


def _disaggregated(settings: Settings) -> Iterator[tuple[str, Served]]:
    kind, token_s = _kind(settings), model_shape(MODEL).kv_bytes_per_token() / NVLINK_BYTES_S
    prompts = msgspec.structs.replace(kind, batching=WHOLE_PROMPTS)
    for prefills in range(ENGINES // 2, ENGINES):
        fleet = Disaggregated(
            _jobs(settings), prompts, prefills, kind, ENGINES - prefills, transfer_s=lambda tokens: tokens * token_s
        )
        yield f"{prefills} prefill and {ENGINES - prefills} decode", fleet.run()


def _jobs(settings: Settings) -> list:
    lengths = sampled(settings.data_dir, ARXIV_4K, 600 if settings.quick else MOST, settings.seed, 4096)
    return poisson(lengths, RATE, settings.seed)


def _kind(settings: Settings) -> EngineKind:
    shape = model_shape(MODEL)
    room = MEMORY_SHARE * TENSOR * accelerator(DEVICE).memory_bytes - shape.weight_bytes()
    return EngineKind(
        table=kernel_table(settings.data_dir, MODEL, DEVICE, TENSOR, settings.prefill_cost),
        kv_tokens=int(room / shape.kv_bytes_per_token()),
    )
