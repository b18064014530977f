"""DistServe: its constants reach our engines unchanged, and its algorithms place as they say."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from reproductions.distserve_placement import (
    NODE_GPUS,
    Parallelism,
    Placement,
    Task,
    alone,
    feasible,
    high_affinity,
    joint_goodput,
    low_affinity,
)
from reproductions.distserve_steps import degrees, kv_room, step_table
from reproductions.published_lengths import SHAREGPT, drawn, sampled

MODELS = ("opt-13b", "opt-66b")


@pytest.mark.parametrize("model", MODELS)
def test_step_times_are_the_artifact_s_constants(model: str, data_dir: Path) -> None:
    raw = json.loads((data_dir / "distserve_sim/profiler-a100-80g.distserve.json").read_text())[f"facebook/{model}"]
    for tensor in degrees(data_dir, model):
        table, found = step_table(data_dir, model, tensor, "distserve"), raw[str(tensor)]
        a, b, c = found["prefill"]
        for tokens in (1, 17, 512, 2048):
            assert table.prefill_s(tokens) == pytest.approx((a + b * tokens + c * tokens**2) / 1e3)
        a, b, c = found["decoding_smallbs"]
        for batch in (1, 2, 40, 95):
            assert table.decode_step_s(batch, 700 * batch) == pytest.approx((a + b * 700 * batch + c * batch) / 1e3)


@pytest.mark.parametrize("model", MODELS)
def test_large_batches_are_off_by_the_one_slope_of_contexts_and_never_shorter(model: str, data_dir: Path) -> None:
    raw = json.loads((data_dir / "distserve_sim/profiler-a100-80g.distserve.json").read_text())[f"facebook/{model}"]
    for tensor in degrees(data_dir, model):
        table, (a, _, c) = step_table(data_dir, model, tensor, "distserve"), raw[str(tensor)]["decoding_largebs"]
        for batch in (120, 200, 256):
            assert table.decode_step_s(batch, 0) >= (a + c * batch) / 1e3 * (1 - 1e-12)
        steps = [table.decode_step_s(batch, 0) for batch in range(1, 257)]
        assert steps == sorted(steps)


def test_costlier_prompts_leave_decoding_as_it_is(data_dir: Path) -> None:
    plain, doubled = (step_table(data_dir, "opt-13b", 1, "vllm", cost) for cost in (1.0, 2.0))
    assert doubled.decode_step_s(8, 5000) == plain.decode_step_s(8, 5000)
    assert doubled.prefill_s(512) - plain.prefill_s(512) == pytest.approx(plain.prefill_s(512) - plain.step_s)


def test_room_for_kv_is_the_artifact_s_and_absent_where_weights_do_not_fit(data_dir: Path) -> None:
    assert kv_room(data_dir, "opt-13b", 1, 1) == 66_144
    assert kv_room(data_dir, "opt-66b", 1, 1) is None


@pytest.mark.parametrize(("p_rate", "d_rate"), [(5.0, 10.0), (1.0, 0.3), (7.0, 7.0)])
def test_algorithm_1_carries_its_rate_in_both_phases_within_the_gpus(p_rate: float, d_rate: float) -> None:
    p, d = Parallelism(2, 1), Parallelism(1, 1)
    found = high_affinity({("prefill", p): p_rate, ("decode", d): d_rate, ("prefill", d): 0.1, ("decode", p): 0.1}, 32)
    assert (found.prefill, found.decode) == (p, d)
    assert found.gpus <= 32
    assert found.goodput == min(found.prefills * p_rate, found.decodes * d_rate)


def test_algorithm_2_leaves_out_no_pair_that_could_be_best(data_dir: Path) -> None:
    """What is pruned by the goodput of single phases is what trying all pairs would not choose."""
    lengths = sampled(data_dir, SHAREGPT, 200, 0, 2048)
    task = Task(data_dir=data_dir, model="opt-13b", ttft_s=0.25, tpot_s=0.1, lengths=lengths, seed=0, stages=(1,), span_s=15.0)
    pairs = [(p, d) for p, d in itertools.product(feasible(task), repeat=2) if p.gpus + d.gpus <= NODE_GPUS]
    every = [Placement(p, 1, d, 1, joint_goodput(task, Placement(p, 1, d, 1, 0.0))) for p, d in pairs]
    best = max(placement.per_gpu for placement in every)
    assert low_affinity(task, alone(task)).per_gpu == pytest.approx(best, rel=0.04)


def test_drawn_lengths_have_the_stated_means_within_the_context() -> None:
    lengths = drawn(1738, 91, 0.5, 2048, 5000, 0)
    assert lengths[:, 0].mean() == pytest.approx(1738, rel=0.01)
    assert lengths[:, 1].mean() == pytest.approx(91, rel=0.01)
    assert lengths.sum(axis=1).max() <= 2049
    assert lengths.min() >= 1
