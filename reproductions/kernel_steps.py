"""Step times from Vidur's profiles of single kernels on A100 and A40: all but attention is measured, attention is the roofline's.

Vidur (MLSys'24) measured each operator of a layer over tokens in a step, and all-reduces over bytes; its profiles of attention are
not at hand. A step lasts the engine's own overhead, layers times the sum of the medians, two all-reduces a layer with tensor
parallelism, and attention by `cluster.performance.roofline`. Prompt tokens and decoding sequences, which go through one kernel
together, are added here as if each took its own time beyond that of one token.
"""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.hardware import Accelerator, accelerator
from cluster.models import model_shape
from cluster.performance import STEP_S, roofline
from cluster.piecewise import Knots
from cluster.step_table import Fit, StepTable

FILES = {"llama-2-70b": "meta-llama__Llama-2-70b-hf"}
KERNELS = (
    "input_layernorm",
    "attn_pre_proj",
    "attn_rope",
    "attn_post_proj",
    "post_attention_layernorm",
    "mlp_up_proj",
    "mlp_act",
    "mlp_down_proj",
    "add",
    "add",  # Twice a layer: after attention and after the feed-forward.
)
PLACES = (1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Tokens in a step at which kernels are looked up."""
A40 = Accelerator(
    name="a40",
    flops=149.7e12,
    memory_bytes=48 * 10**9,
    bandwidth_bytes_s=696e9,
    link_bytes_s=112.5e9,
    idle_w=30.0,
    tdp_w=300.0,
    source="NVIDIA A40 data sheet",
)


def kernel_table(data_dir: Path, model: str, device: str, tensor_parallel: int, prefill_cost: float = 1.0) -> StepTable:
    """model: a key of FILES. device: `a100-80g` or `a40`. tensor_parallel: 1, 2 or 4; all-reduces are those of A100 machines."""
    shape = model_shape(model)
    attention = roofline(shape, A40 if device == "a40" else accelerator(device), tensor_parallel)
    layer_s = _kernels_s(data_dir, model, device, tensor_parallel) + 2 * _all_reduce_s(data_dir, shape.hidden, tensor_parallel)
    seconds = shape.layers * np.maximum.accumulate(layer_s)
    beyond: Knots = (
        (0.0, 0.0),
        *((float(place), float(value - seconds[0])) for place, value in zip(PLACES[1:], seconds[1:], strict=True)),
    )
    return StepTable(
        step_s=STEP_S + float(seconds[0]),
        prefill=beyond,
        prefill_pair_s=attention.prefill_pair_s,
        decode=beyond,
        kv=((0.0, 0.0), (1.0, attention.kv_token_s)),
        fit=Fit(
            source="Vidur's kernel profiles (MLSys'24); attention by roofline",
            points=len(PLACES),
            mean_error=0.0,
            largest_error=0.0,
            prefill_tokens=(1.0, PLACES[-1]),
            sequences=(1.0, PLACES[-1]),
            kv_tokens=(1.0, 1e6),
            hardware=device,
            model=model,
            tensor_parallel=tensor_parallel,
            derived="attention: roofline",
        ),
    ).stretched(prefill=prefill_cost, decode=1.0)


def _kernels_s(data_dir: Path, model: str, device: str, tensor_parallel: int) -> NDArray[np.float64]:
    """Of one layer, at PLACES."""
    path = data_dir / f"vidur/compute__{device.split('-')[0]}__{FILES[model]}__mlp.csv.gz"
    found: dict[int, float] = {}
    for row in _rows(path):
        if int(row["num_tensor_parallel_workers"]) == tensor_parallel:
            found[int(row["num_tokens"])] = sum(float(row[f"time_stats.{kernel}.median"]) for kernel in KERNELS) / 1e3
    tokens = sorted(found)
    return np.interp(PLACES, tokens, [found[count] for count in tokens])


def _all_reduce_s(data_dir: Path, hidden: int, tensor_parallel: int) -> NDArray[np.float64]:
    """Of one float16 vector a token, at PLACES; 0 on one device."""
    if tensor_parallel == 1:
        return np.zeros(len(PLACES))
    found: dict[int, float] = {}
    for row in _rows(data_dir / "vidur/network__a100_dgx__all_reduce.csv.gz"):
        if int(row["num_workers"]) == int(row["devices_per_node"]) == tensor_parallel:
            found[int(row["size"])] = float(row["time_stats.all_reduce.median"]) / 1e3
    sizes = sorted(found)
    return np.interp([2 * hidden * place for place in PLACES], sizes, [found[size] for size in sizes])


def _rows(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt") as lines:
        return list(csv.DictReader(lines))
