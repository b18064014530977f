"""Published step times, as the shared data holds them, in the form that a fit takes. Reads; fits nothing.

The shared files are described in their manifest: Splitwise's `perf_model.csv` (ISCA'24), DistServe's fitted constants
(OSDI'24), and ml.energy's decode profiles (vLLM of 2025).
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from cluster.hardware import accelerator
from cluster.performance import causal_pairs
from cluster.table_fitting import Measured, Step

SPLITWISE, DISTSERVE, ML_ENERGY = (
    "splitwise_sim/perf_model.csv",
    "distserve_sim/profiler-a100-80g.distserve.json",
    "derived/ml_energy_llm_decode_profiles.csv",
)
MOSTLY_DECODING = 0.1  # Share of a run's time that its prompt may take, for its mean watts to be those of decoding.
SATURATING_TOKENS = 2048  # Prompts that keep an A100 at its limit of watts (Splitwise, ISCA'24, figure on phase power).
LONGEST_OF_PARTS = 1.5  # All rows but those of 64 prompts on two devices stay below 1.2.
OPT_CONTEXT = 2048


class Profile(NamedTuple):
    """All that is measured of a shape on so many devices of a kind."""

    shape: str
    device: str
    devices: int
    points: list[Measured]
    prefill_w: list[float]
    """Watts of all devices together, during prompts; empty where not measured."""
    decode_w: list[tuple[float, float]]
    """(decoding sequences, watts of all devices together)."""


def splitwise(data: Path) -> Iterator[Profile]:
    """Llama-2-70B at TP 2, 4 and 8, BLOOM-176B at TP 8, on A100 and H100; watts on A100 only.

    The rows of a capped H100 are left out: they are those of the other with prompts 1.3 times as long, not measurements. A decode
    time is the mean over a run, and is taken at the run's middle; how many tokens a run had follows from its whole length, since
    the longest ended before the tokens asked for.
    """
    kinds = {"a100-80gb": "a100-80g", "h100-80gb": "h100"}
    groups: dict[tuple[str, str, int], list[dict[str, str]]] = defaultdict(list)
    for row in _rows(data / SPLITWISE):
        if row["hardware"] in kinds and _as_one_batch(row):
            groups[row["model"], row["hardware"], int(row["tensor_parallel"])].append(row)
    shapes = {"llama2-70b": "llama-2-70b", "bloom-176b": "bloom-176b"}
    for (model, hardware, devices), rows in groups.items():
        device = kinds[hardware]
        tdp_w = devices * accelerator(device).tdp_w
        points = [point for row in rows for point in _prompt_and_decode(row)]
        known = [row for row in rows if float(row["average_power"]) > 0.0]
        saturated = [row for row in known if int(row["prompt_size"]) * int(row["batch_size"]) >= SATURATING_TOKENS]
        decoding = [row for row in known if float(row["prompt_time"]) <= MOSTLY_DECODING * float(row["e2e_time"])]
        yield Profile(
            shapes[model],
            device,
            devices,
            points,
            [tdp_w * float(row["peak_power"]) for row in saturated],
            [(float(row["batch_size"]), tdp_w * float(row["average_power"])) for row in decoding],
        )


def distserve(data: Path) -> Iterator[Profile]:
    """OPT-13B and OPT-66B on A100, from the constants that its artifact fitted to its own profiles; no watts.

    Prompts of 64 to 2048 tokens alone; batches of 1 to 256 with 128 to 1920 tokens of context each, by the constants of their
    regime, which changes at a batch of 95.
    """
    for model, by_devices in json.loads((data / DISTSERVE).read_text()).items():
        for devices, fitted in by_devices.items():
            yield Profile(model.split("/")[1], "a100-80g", int(devices), list(_from_constants(fitted)), [], [])


def ml_energy(data: Path, shapes: Mapping[str, str]) -> Iterator[Profile]:
    """Decode steps and watts on H100 and B200 of bfloat16 models in `shapes`, from the name there to that of the catalogue.

    A step is the median time between two tokens, in which prompts come between now and then. A sequence is taken as half grown;
    prompts, whose lengths are not told, are not counted. Left out are the runs of long answers on B200, which contradict the
    others: a batch of 8 of an 8B model takes 32 ms there, and 5 ms in chats.
    """
    groups: dict[tuple[str, str, int], list[dict[str, str]]] = defaultdict(list)
    for row in _rows(data / ML_ENERGY):
        contradicted = row["gpu"] == "B200" and row["task"] == "gpqa"
        if row["model"] in shapes and row["weight_precision"] == "bfloat16" and not contradicted:
            groups[shapes[row["model"]], row["gpu"].lower(), int(row["num_gpus"])].append(row)
    for (shape, device, devices), rows in groups.items():
        points, watts = [], []
        for row in rows:
            batch = float(row["avg_batch"])
            step = Step(sequences=batch, kv_tokens=batch * float(row["avg_output_len"]) / 2)
            points.append(Measured((step,), float(row["itl_p50_ms"]) / 1e3))
            watts.append((batch, float(row["power_w_total"])))
        yield Profile(shape, device, devices, points, [], watts)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open() as lines:
        yield from csv.DictReader(lines)


def _as_one_batch(row: Mapping[str, str]) -> bool:
    """Whether the run lasted as its parts say; those of batches that did not fit in memory lasted many times as long."""
    parts_ms = float(row["prompt_time"]) + int(row["token_size"]) * float(row["token_time"])
    return float(row["e2e_time"]) <= LONGEST_OF_PARTS * parts_ms


def _prompt_and_decode(row: Mapping[str, str]) -> Iterator[Measured]:
    prompt, batch = int(row["prompt_size"]), int(row["batch_size"])
    prompt_ms, token_ms = float(row["prompt_time"]), float(row["token_time"])
    yield Measured((Step(prompt * batch, batch * causal_pairs(0, prompt), 0, 0),), prompt_ms / 1e3)
    generated = max(1.0, (float(row["e2e_time"]) - prompt_ms) / token_ms)
    # To 16 tokens, so that repeats of one setting count as one shape of step.
    kv_tokens = batch * 16 * round((prompt + generated / 2) / 16)
    yield Measured((Step(0, 0, batch, kv_tokens),), token_ms / 1e3)


def _from_constants(fitted: Mapping[str, list[float]]) -> Iterator[Measured]:
    """Milliseconds: a prompt is a + b l + c l^2; a decode step a + b contexts + c batch."""
    fixed, token, square = fitted["prefill"]
    for tokens in (64, 128, 256, 512, 768, 1024, 1536, OPT_CONTEXT):
        step = Step(tokens, causal_pairs(0, tokens), 0, 0)
        yield Measured((step,), (fixed + token * tokens + square * tokens**2) / 1e3)
    for batch in (1, 2, 4, 8, 16, 32, 64, 95, 96, 128, 192, 256):
        small = batch <= fitted["decoding_large_small_bs_threshold"]  # type: ignore[operator]
        fixed, context, sequence = fitted["decoding_smallbs" if small else "decoding_largebs"]
        for tokens in (128, 512, 1024, 1920):
            kv_tokens = batch * tokens
            yield Measured((Step(0, 0, batch, kv_tokens),), (fixed + context * kv_tokens + sequence * batch) / 1e3)


def contexts_vary(points: list[Measured]) -> bool:
    """Whether batches of like size had contexts three times as long as others, so that KV can be told from sequences."""
    by_size: dict[int, list[float]] = defaultdict(list)
    for point in points:
        for step in point.steps:
            if step.sequences:
                by_size[round(math.log2(step.sequences))].append(step.kv_tokens / step.sequences)
    return any(max(contexts) >= 3 * min(contexts) for contexts in by_size.values())
