"""Who asks for how much and when, as in Llumnix's runs: power-law or ShareGPT lengths, gamma arrivals."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from workloads import arrivals
from workloads.chance import stream

LONGEST = 6144
"""Of a prompt or an answer, tokens: what an A10 has room for beside the weights, halved (Llumnix, OSDI'24, section 6.1)."""
EXPONENTS = {128: 2.0, 256: 1.5, 512: 1.15}
"""Of the power law, by mean: short, medium and long (github AlibabaPAI/llumnix, benchmark/benchmark_serving.py)."""
SHAREGPT = "sarathi/sharegpt_8k_filtered_stats_llama2_tokenizer.csv"
LONGEST_SUM = 12_000
"""Of prompt and answer together: fewer than an instance has room for."""


class Asked(NamedTuple):
    """One request."""

    arrival_s: float
    prompt: int
    output: int
    high: bool = False


class Mix(NamedTuple):
    """Lengths by name: `S-S` is short prompts and short answers."""

    name: str
    prompt_mean: int = 0
    output_mean: int = 0
    """Means of power laws; 0, 0 is ShareGPT's pairs."""


MIXES = (
    Mix("ShareGPT"),
    Mix("S-S", 128, 128),
    Mix("M-M", 256, 256),
    Mix("L-L", 512, 512),
    Mix("S-L", 128, 512),
    Mix("L-S", 512, 128),
)


def power_law(mean: int, count: int, chance: np.random.Generator) -> NDArray[np.int64]:
    """Zipf over ranks 1 to 2 mean, stretched to the mean, clipped at LONGEST: as the authors' generator draws them."""
    ranks = np.arange(1, 2 * mean)
    weights = ranks ** -EXPONENTS[mean]
    drawn = chance.choice(ranks, count, p=weights / weights.sum())
    return np.minimum(np.ceil(drawn * (mean / drawn.mean())), LONGEST).astype(np.int64)


def lengths(mix: Mix, count: int, seed: int, data_dir: Path) -> NDArray[np.int64]:
    """[count, 2]: prompt and answer."""
    chance = stream(seed, f"lengths of {mix.name}")
    if mix.prompt_mean:
        return np.column_stack((power_law(mix.prompt_mean, count, chance), power_law(mix.output_mean, count, chance)))
    with (data_dir / SHAREGPT).open() as lines:
        seen = [(int(row["num_prefill_tokens"]), int(row["num_decode_tokens"])) for row in csv.DictReader(lines)]
    fitting = np.array([pair for pair in seen if sum(pair) <= LONGEST_SUM])
    return fitting[chance.integers(len(fitting), size=count)]


def workload(
    mix: Mix, rate: float, count: int, seed: int, data_dir: Path, *, cv: float = 1.0, high_share: float = 0.0
) -> list[Asked]:
    """rate: requests per second. cv: coefficient of variation of the gaps; 1 is Poisson. high_share: of high priority."""
    steps = ((rate, 2.0 * count / rate),)
    times: list[float] = []
    for chunk in arrivals.arrivals(steps, 1.0 / cv**2, stream(seed, "arrivals")):
        times += chunk.tolist()
        if len(times) >= count:
            break
    high = stream(seed, "priorities").random(count) < high_share
    rows = lengths(mix, count, seed, data_dir).tolist()
    return [
        Asked(arrival_s, prompt, output, bool(first))
        for arrival_s, (prompt, output), first in zip(times[:count], rows, high, strict=False)
    ]
