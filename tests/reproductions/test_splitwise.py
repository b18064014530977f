"""Splitwise's clusters: its scheduler's three pools, its curves, and what a request takes when it is alone."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy.interpolate import interp1d

from cluster.record import TraceRow
from reproductions import splitwise
from reproductions.settings import Settings
from reproductions.splitwise import BOUNDS, Bench, Design, bracket, designs, holds, slowdown, worst
from reproductions.splitwise_cluster import KV_BYTES, LINK_BYTES_S, Cluster, corrected_curves, published_curves
from reproductions.splitwise_scheduler import MixedPools, Placement, Shortest


def pools(prompts: int = 2, tokens: int = 2, *, kv_tokens: float = 10_000.0, waiting: bool = True) -> MixedPools:
    return MixedPools(prompts, tokens, kv_tokens, lambda machine: waiting)


# ── the scheduler ──


def test_shortest_queue_is_joined() -> None:
    scheduler = Shortest(2)
    assert [scheduler.place(prompt, 10).prompt for prompt in (1000, 300, 300, 300, 300, 300)] == [0, 1, 1, 1, 1, 0]


def test_prompt_and_tokens_go_to_the_least_loaded_machine_of_their_pools() -> None:
    scheduler = pools()
    assert [scheduler.place(1000, 100), scheduler.place(500, 100), scheduler.place(10, 10)] == [
        Placement(0, 2),
        Placement(1, 3),
        Placement(1, 3),
    ]


def test_a_token_machine_turns_mixed_when_prompt_queues_are_long_and_goes_home_once_idle() -> None:
    scheduler = pools(1, 2, kv_tokens=1e6)
    scheduler.place(8000, 2)
    placed = scheduler.place(193, 2)
    assert placed.prompt in (1, 2)
    assert scheduler.mixed_pool == [placed.prompt]
    scheduler.idle(placed.prompt)
    assert scheduler.mixed_pool == []
    assert sorted(scheduler.token_pool) == [1, 2]


def test_a_machine_that_has_begun_all_it_has_takes_a_prompt_beyond_the_queue_s_bound() -> None:
    scheduler = pools(1, 2, kv_tokens=1e6, waiting=False)
    scheduler.place(8000, 2)
    assert scheduler.place(193, 2).prompt == 0


def test_a_prompt_machine_turns_mixed_when_the_tokens_machines_are_full() -> None:
    scheduler = pools(2, 1, kv_tokens=1500.0)
    assert scheduler.place(1000, 100) == Placement(0, 2)
    placed = scheduler.place(1000, 100)
    assert placed.token in (0, 1)
    assert scheduler.mixed_pool == [placed.token]


def test_what_ends_is_no_load_any_more() -> None:
    scheduler = pools()
    placed = scheduler.place(1000, 100)
    scheduler.prompt_done(placed.prompt, 1000)
    scheduler.moved(placed.prompt, 1000)
    scheduler.ended(placed.token, 1000, 100)
    assert scheduler.pending == [0] * 4
    assert scheduler.held == [0] * 4


# ── the curves ──


@pytest.mark.parametrize(("machine", "name"), [("A100", "a100-80gb"), ("H100", "h100-80gb"), ("H100cap", "h100-80gb-pcap")])
def test_published_curve_interpolates_the_profile_s_medians(data_dir: Path, machine: str, name: str) -> None:
    found: dict[str, dict[int, list[float]]] = {"prompt_time": {}, "token_time": {}}
    with (data_dir / "splitwise_sim/perf_model.csv").open() as file:
        for row in csv.DictReader(file):
            if row["model"] == "bloom-176b" and row["hardware"] == name:
                tokens = int(row["prompt_size"]) * int(row["batch_size"])
                for column, times in found.items():
                    times.setdefault(tokens, []).append(float(row[column]) / 1000)
    prompts_s, decodes_s = (
        interp1d(sorted(times), [np.median(times[tokens]) for tokens in sorted(times)], fill_value="extrapolate")
        for times in found.values()
    )
    table = published_curves(data_dir).tables[machine]
    for tokens in (1, 17, 128, 700, 2048, 5000, 40_000):
        assert table.step_time_s(tokens, 0, 0, 0) == pytest.approx(float(prompts_s(tokens)))
    for sequences in (1, 40, 128, 300, 512):
        assert table.decode_step_s(sequences, 1000 * sequences) == pytest.approx(float(decodes_s(sequences)))
    assert table.step_time_s(900, 0, 100, 100_000) == pytest.approx(1.1 * float(prompts_s(1000)))


def test_published_decode_steps_hardly_grow_and_corrected_ones_do(data_dir: Path) -> None:
    published, corrected = published_curves(data_dir).tables["A100"], corrected_curves().tables["A100"]
    assert published.decode_step_s(64, 64 * 576) / published.decode_step_s(1, 576) < 1.02
    assert corrected.decode_step_s(64, 64 * 576) / corrected.decode_step_s(1, 576) > 1.9


# ── a cluster ──


def alone(arrival_s: float, prompt: int, output: int) -> TraceRow:
    return TraceRow(arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output)


@pytest.mark.parametrize("told", ["published", "corrected"])
def test_a_request_alone_on_an_a100_is_not_slowed_down(data_dir: Path, told: str) -> None:
    curves = published_curves(data_dir) if told == "published" else corrected_curves()
    times = Cluster([curves.tables["A100"]], 1, 0).run([alone(60.0 * n, 100 + 300 * n, 2 + 40 * n) for n in range(12)])
    ttft, _, e2e = slowdown(times, curves, 1.0)
    assert ttft == pytest.approx(1.0)
    # The published simulator looks its steps up at one sequence, and its reference at the prompt's tokens.
    assert e2e == pytest.approx(1.0, abs=0.09 if told == "published" else 0.001)


def test_tokens_wait_for_the_kv_on_its_way(data_dir: Path) -> None:
    table = published_curves(data_dir).tables["A100"]
    [prompt, output] = 1500, 20
    whole = Cluster([table], 1, 0).run([alone(0.0, prompt, output)])
    split = Cluster([table, table], 1, 1).run([alone(0.0, prompt, output)])
    assert split.first_s == whole.first_s
    assert (split.last_s - whole.last_s)[0] == pytest.approx(prompt * KV_BYTES / LINK_BYTES_S)


@pytest.mark.parametrize("design", [Design("mixed", "A100", 4, "", 0), Design("split", "A100", 2, "A100", 2)])
def test_every_request_is_served_once_even_when_there_are_too_many(data_dir: Path, design: Design) -> None:
    rows = [alone(0.02 * n, 5 + 911 * n % 4000, 1 + 37 * n % 200) for n in range(400)]
    cluster = Cluster([published_curves(data_dir).tables["A100"]] * 4, design.prompts, design.tokens)
    times = cluster.run(rows)
    assert (times.first_s > times.arrival_s).all()
    assert (times.last_s >= times.first_s).all()
    assert cluster.left() == 0


def test_slo_is_all_nine_below_their_bounds() -> None:
    assert holds(BOUNDS - 1e-9)
    for place in np.ndindex(BOUNDS.shape):
        slowdowns = BOUNDS - 1e-9
        slowdowns[place] = BOUNDS[place]
        assert not holds(slowdowns)


def test_what_breaks_is_the_one_furthest_beyond_its_bound() -> None:
    slowdowns = BOUNDS * 0.9
    slowdowns[1, 1] = 1.8
    assert worst(slowdowns) == "TBT P90 is 1.80"


def test_designs_and_brackets_are_those_of_the_data(data_dir: Path) -> None:
    found = {design.name: design for design in designs(data_dir, "iso-power")}
    assert found["Splitwise-HHcap"] == Design("Splitwise-HHcap", "H100", 25, "H100cap", 21)
    assert found["Baseline-A100"] == Design("Baseline-A100", "A100", 70, "", 0)
    assert [bracket(data_dir, name) for name in ("Baseline-A100", "Splitwise-HHcap")] == [(40.0, 60.0), (140.0, 160.0)]
    assert bracket(data_dir, "Splitwise-HA") == (140.0, float("inf"))


@pytest.mark.parametrize(("name", "rate"), [("Baseline-A100", 40.0), ("Baseline-A100", 60.0), ("Baseline-H100", 100.0)])
def test_slowdowns_are_those_of_its_simulator(data_dir: Path, name: str, rate: float) -> None:
    [run] = [run for run in splitwise.reference_runs(data_dir) if run["design"] == name and float(run["rps"]) == rate]
    bench = Bench(Settings(data_dir=data_dir, quick=True))
    [design] = [design for design in designs(data_dir, "iso-power") if design.name == name]
    [curves, load] = published_curves(data_dir), float(run["completed"]) / 60.0
    ours = np.mean([bench.slowdowns(design, curves, load, 60.0, trace) for trace in bench.traces], axis=0)
    theirs = [float(run[f"{kind}_p{quantile}"]) for kind in ("ttft", "tbt", "e2e") for quantile in (50, 90, 99)]
    assert ours.ravel() == pytest.approx(theirs, rel=0.08)


def test_a_bench_measures_the_same_with_the_same_seed(data_dir: Path) -> None:
    design, curves = Design("split", "A100", 3, "A100", 2), published_curves(data_dir)
    [first, second, other] = [
        Bench(Settings(data_dir=data_dir, seed=seed)).slowdowns(design, curves, 5.0, 30.0, 0).tolist() for seed in (0, 0, 1)
    ]
    assert first == second != other
