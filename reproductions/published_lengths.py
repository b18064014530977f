"""Lengths in the data sets of the papers: their rows where they are at hand, else drawn to the stated means."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reproductions.engine_fleets import Job
from workloads.chance import stream

SHAREGPT = "sarathi/sharegpt_8k_filtered_stats_llama2_tokenizer.csv"
ARXIV_4K = "vidur/arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv"
ROUNDS = 30  # Of fitting a clipped distribution's mean; each leaves a part of the error.

FEWEST = 1000
"""Jobs of which a share of 90 % says something: to a point, one standard error. Fewer would make it jump from rate to rate."""
MOST = 3000
"""To half a point; more would only take longer."""

Lengths = NDArray[np.int64]
"""[jobs, 2]: prompt and answer."""


def sampled(data_dir: Path, name: str, count: int, seed: int, most_tokens: int | None = None) -> Lengths:
    """Rows of a file of lengths, drawn with replacement, of those with at most so many tokens in all."""
    with (data_dir / name).open() as lines:
        rows = [(int(row["num_prefill_tokens"]), int(row["num_decode_tokens"])) for row in csv.DictReader(lines)]
    seen = np.array([row for row in rows if min(row) > 0 and (most_tokens is None or sum(row) <= most_tokens)])
    return seen[stream(seed, name).integers(len(seen), size=count)]


def drawn(prompt: float, output: float, sigma: float, most_tokens: int, count: int, seed: int) -> Lengths:
    """Lognormal of shape `sigma`, so scaled that the means are those given once what is above `most_tokens` in all is clipped."""
    chance = stream(seed, "drawn lengths")
    outputs = _with_mean(output, chance.lognormal(0.0, sigma, count), most_tokens / 2)
    prompts = _with_mean(prompt, chance.lognormal(0.0, sigma, count), most_tokens - outputs)
    return np.column_stack((prompts, outputs)).astype(np.int64)


def _with_mean(mean: float, shape: NDArray[np.float64], most: float | NDArray[np.float64]) -> NDArray[np.float64]:
    scale = mean
    for _ in range(ROUNDS):
        scale *= mean / float(np.clip(scale * shape, 1, most).mean())
    return np.rint(np.clip(scale * shape, 1, most))


def poisson(lengths: Lengths, rate: float, seed: int, span_s: float | None = None) -> list[Job]:
    """Arrivals of a Poisson process; the same at every rate, but for the scale of time.

    span_s: as many jobs as come in so long, FEWEST to MOST, the lengths over again where there are fewer. None: one each.
    Without it a fixed number of jobs would hide an overload that lasts no longer than the bounds on latency.
    """
    count = len(lengths) if span_s is None else min(max(FEWEST, round(rate * span_s)), MOST)
    times_s = np.cumsum(stream(seed, "arrivals").standard_exponential(count)) / rate
    rows = np.resize(lengths, (count, 2)).tolist()
    return [Job(at_s, prompt, output) for at_s, (prompt, output) in zip(times_s.tolist(), rows, strict=True)]
