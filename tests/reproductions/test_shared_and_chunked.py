"""semi-PD, TaiChi, Sarathi-Serve and NanoFlow: the mechanisms do what the papers say of them, in quick runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.reproduce import encoded
from cluster.measured import table_for
from reproductions import nanoflow, sarathi, taichi
from reproductions.engine_fleets import EngineKind, Job
from reproductions.row import Row
from reproductions.semi_pd import LOADS, SharedGpu
from reproductions.settings import Settings

KIND = EngineKind(table=table_for("llama-3.1-8b", "a100-80g", 1), kv_tokens=400_000)


@pytest.fixture
def quick(data_dir: Path) -> Settings:
    return Settings(data_dir=data_dir, quick=True)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_a_prompt_on_a_share_of_a_gpu_takes_its_inverse(share: float) -> None:
    served = SharedGpu([Job(0.0, 2000, 2)], KIND, share, saturating=0.5).run()
    assert served.ttft_s[0] == pytest.approx(KIND.table.prefill_s(2000) / share)


def test_decoding_slows_only_below_the_share_that_saturates_memory() -> None:
    tpots = [SharedGpu([Job(0.0, 100, 200)], KIND, share, saturating=0.5).run().tpot_s[0] for share in (0.2, 0.5, 0.75)]
    assert tpots[0] == pytest.approx(tpots[1])
    assert tpots[2] == pytest.approx(2 * tpots[1])


def test_feedback_gives_more_to_the_phase_that_is_late() -> None:
    prompts = SharedGpu([Job(0.3 * n, 4000, 2) for n in range(60)], KIND, 0.5, 1.0, LOADS[0])
    prompts.run()
    answers = SharedGpu([Job(0.01 * n, 200, 1500) for n in range(250)], KIND, 0.9, 1.0, LOADS[0])
    answers.run()
    assert prompts.share > 0.5
    assert answers.share < 0.9


def test_rows_can_be_written_down(quick: Settings) -> None:
    """numpy's numbers cannot."""
    assert encoded([*nanoflow.rows(quick), *taichi.rows(quick), *sarathi._chunk_costs(quick), *sarathi._ablation(quick)])


def test_taichi_s_winners_are_ours_at_all_three_points(quick: Settings) -> None:
    assert [row.verdict for row in taichi.rows(quick)] == ["within"] * 3


def test_chunks_cost_prompts_no_more_than_sarathi_says(quick: Settings) -> None:
    rows: list[Row] = list(sarathi._chunk_costs(quick))
    assert [row.verdict for row in rows] == ["within"] * 2


def test_small_budgets_win_under_the_strict_bound_and_large_ones_under_the_relaxed(quick: Settings) -> None:
    assert [row.verdict for row in sarathi._budgets(quick)] == ["within"] * 2


def test_no_engine_reaches_nanoflow_s_optimum(quick: Settings) -> None:
    for prompt, output in nanoflow.LENGTHS:
        assert 20.0 < nanoflow._reached(quick, prompt, output).ours < 70.0


def test_the_optimum_is_compute_over_twice_the_parameters(quick: Settings) -> None:
    first = next(nanoflow.rows(quick))
    assert first.ours == pytest.approx(280e12 / (2 * 68.98e9), rel=1e-3)
    assert first.label == "input"
