"""The roofline against measured profiles: the error table of its docstring."""

from __future__ import annotations

import csv
import json
import os
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.errors import InvalidConfig
from cluster.hardware import ACCELERATORS, accelerator
from cluster.models import MODELS, model_shape
from cluster.performance import PerformanceModel, roofline

DATA = Path(os.environ.get("MOBULA_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))

DENSE = {
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B-Instruct": "llama-3.1-70b",
    "meta-llama/Llama-3.3-70B-Instruct": "llama-3.1-70b",
    "meta-llama/Llama-3.1-405B-Instruct": "llama-3.1-405b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-14B": "qwen3-14b",
    "Qwen/Qwen3-32B": "qwen3-32b",
}
MOE = {
    "Qwen/Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b",
    "Qwen/Qwen3-30B-A3B-Thinking-2507": "qwen3-30b-a3b",
    "Qwen/Qwen3-235B-A22B-Instruct-2507": "qwen3-235b-a22b",
    "Qwen/Qwen3-235B-A22B-Thinking-2507": "qwen3-235b-a22b",
}


def _file(path: str) -> Path:
    if not (DATA / path).is_file():
        pytest.skip(f"no {DATA / path}: set MOBULA_DATA to the directory of measured profiles")
    return DATA / path


def _on(shape: str, device: str, tensor_parallel: int) -> PerformanceModel:
    return roofline(model_shape(shape), accelerator(device), tensor_parallel)


def _decodes(models: dict[str, str], gpu: str) -> Iterator[tuple[PerformanceModel, int, int, int, float, float]]:
    """Model, devices, batch, KV tokens, seconds of the median step and watts per GPU. A sequence is half grown on average."""
    with _file("derived/ml_energy_llm_decode_profiles.csv").open() as lines:
        for row in csv.DictReader(lines):
            if row["model"] in models and row["weight_precision"] == "bfloat16" and row["gpu"] == gpu:
                devices, batch = int(row["num_gpus"]), float(row["avg_batch"])
                kv_tokens = round(batch * float(row["avg_output_len"]) / 2)
                model = _on(models[row["model"]], gpu.lower(), devices)
                yield model, devices, round(batch), kv_tokens, float(row["itl_p50_ms"]) / 1e3, float(row["power_w_per_gpu"])


def _prompts(device: str) -> Iterator[tuple[float, float]]:
    """Predicted and measured seconds of one prompt of Llama-2-70B (Splitwise): medians over repeats."""
    repeats = defaultdict(list)
    with _file("splitwise_sim/perf_model.csv").open() as lines:
        for row in csv.DictReader(lines):
            prompt, devices = int(row["prompt_size"]), int(row["tensor_parallel"])
            of_interest = row["batch_size"] == "1" and row["token_size"] == "128" and prompt >= 512 and devices <= 4
            if row["model"] == "llama2-70b" and row["hardware"] == device and of_interest:
                repeats[devices, prompt].append(float(row["prompt_time"]) / 1e3)
    name = {"a100-80gb": "a100-80g", "h100-80gb": "h100"}[device]
    for (devices, prompt), times in repeats.items():
        yield _on("llama-2-70b", name, devices).prefill_s(prompt), statistics.median(times)


def _distserve() -> Iterator[tuple[str, PerformanceModel, dict[str, list[float]]]]:
    for model, by_devices in json.loads(_file("distserve_sim/profiler-a100-80g.distserve.json").read_text()).items():
        shape = model.split("/")[1]
        if shape in MODELS:
            for devices, fitted in by_devices.items():
                yield devices, _on(shape, "a100-80g", int(devices)), fitted


def _check(pairs: list[tuple[float, float]], points: int, mean: float, largest: float) -> None:
    errors = [abs(predicted / measured - 1) for predicted, measured in pairs]
    assert len(errors) == points
    assert statistics.fmean(errors) <= mean, f"mean error {statistics.fmean(errors):.1%}, largest {max(errors):.1%}"
    assert max(errors) <= largest, f"mean error {statistics.fmean(errors):.1%}, largest {max(errors):.1%}"


@pytest.mark.parametrize(
    ("models", "gpu", "points", "mean", "largest"),
    [(DENSE, "H100", 64, 0.05, 0.17), (DENSE, "B200", 59, 0.26, 0.84), (MOE, "H100", 33, 0.26, 0.95)],
    ids=["dense-h100", "dense-b200", "moe-h100"],
)
def test_decode_steps_stay_within_the_stated_error(
    models: dict[str, str], gpu: str, points: int, mean: float, largest: float
) -> None:
    rows = [row for row in _decodes(models, gpu) if row[2] <= 256]
    _check([(model.decode_step_s(batch, kv), measured) for model, _, batch, kv, measured, _ in rows], points, mean, largest)


def test_decode_power_stays_within_the_stated_error() -> None:
    rows = _decodes(DENSE, "H100")
    _check([(model.power_w(0, 0, batch, kv) / many, watts) for model, many, batch, kv, _, watts in rows], 77, 0.05, 0.20)


def test_prompts_on_h100_stay_within_the_stated_error() -> None:
    _check(list(_prompts("h100-80gb")), 10, 0.12, 0.24)


def test_prompts_on_a100_stay_within_the_stated_error() -> None:
    pairs = list(_prompts("a100-80gb"))
    for devices, model, fitted in _distserve():
        fixed, linear, square = fitted["prefill"]
        if int(devices) <= 4:
            pairs += [(model.prefill_s(size), (fixed + linear * size + square * size**2) / 1e3) for size in (512, 1024, 2048)]
    _check(pairs, 28, 0.09, 0.25)


def test_decode_on_a100_stays_within_the_stated_error() -> None:
    pairs = []
    for _, model, fitted in _distserve():
        for batch in (1, 8, 32, 64):
            fixed, context, sequence = fitted["decoding_smallbs"]
            measured = {kv: (fixed + context * kv + sequence * batch) / 1e3 for kv in (256 * batch, 1024 * batch)}
            pairs += [(model.decode_step_s(batch, kv), seconds) for kv, seconds in measured.items()]
    _check(pairs, 56, 0.22, 0.48)


@pytest.mark.parametrize("device", ACCELERATORS)
@pytest.mark.parametrize("shape", MODELS)
def test_every_shape_on_every_device_is_a_sound_model(shape: str, device: str) -> None:
    model = _on(shape, device, 1)
    assert 0 < model.step_s < model.prefill_s(16) < model.prefill_s(2048)
    assert 0 < model.idle_w < model.decode_w < model.prefill_w <= accelerator(device).tdp_w


def test_more_devices_are_faster_and_draw_more() -> None:
    one, four = _on("llama-3.1-70b", "h200", 1), _on("llama-3.1-70b", "h200", 4)
    assert four.decode_step_s(32, 32_000) < one.decode_step_s(32, 32_000)
    assert four.prefill_s(2048) < one.prefill_s(2048)
    assert four.decode_w == 4 * one.decode_w


def test_devices_that_do_not_divide_the_heads_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="tensor_parallel 3 does not divide 32"):
        _on("llama-3.1-8b", "h100", 3)


def test_an_unknown_accelerator_names_those_near_it() -> None:
    with pytest.raises(InvalidConfig, match="'h1000' is not known; near: h100"):
        accelerator("h1000")
