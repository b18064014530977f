"""Nothing is fitted to what is judged, and the fit finds what it is there to find."""

from __future__ import annotations

import pytest

from benchmarks.fleet_calibration import Fitted, Seen, fitted
from benchmarks.live_vs_simulated import (
    CALIBRATION,
    CALIBRATION_SEED,
    LOADS,
    UNSEEN,
    UNSEEN_SEED,
    arms,
    carried_rps,
    trace,
)
from benchmarks.simulated_replay import replay
from cluster.performance import PerformanceModel
from cluster.step_table import step_table_of
from simulator.world import World

ALONE = PerformanceModel(step_s=0.002, prefill_token_s=1e-4, sequence_s=2e-4, kv_token_s=1e-7)
EVEN = World(replica_speed_sd=0.0, startup_sd=0.0)
TABLES = {"mixed": step_table_of(ALONE)}


def test_judged_traces_share_neither_lengths_nor_arrivals_with_the_calibration():
    calibration = trace([(20.0, 30.0)], CALIBRATION, CALIBRATION_SEED)
    for number in range(len(LOADS)):
        unseen = trace([(20.0, 30.0)], UNSEEN, UNSEEN_SEED + number)
        assert not {row.arrival_s for row in calibration} & {row.arrival_s for row in unseen}
    assert CALIBRATION[0] != UNSEEN[0]
    assert CALIBRATION[1] != UNSEEN[1]


def test_judged_prompts_fit_what_the_replicas_hold():
    for lengths in (CALIBRATION, UNSEEN):
        prompt, output = lengths
        for arm in arms().values():
            assert all(prompt.high + output.high <= group.kv_blocks * group.block_tokens for group in arm.fleet.replicas)


def test_the_fit_finds_the_factors_and_the_delay_of_a_fleet_that_has_them(tmp_path):
    truth = Fitted(step=1.6, prefill=1.25, decode=0.8, hop_s=0.004)
    arm = arms()["unpaced"]
    rows = trace([(8.0, 15.0), (20.0, 15.0)], CALIBRATION, CALIBRATION_SEED)
    seen = replay(arm.fleet, rows, truth.world(TABLES, EVEN, tmp_path)).timings
    found, left = fitted(arm.fitted, arm.fleet, TABLES, EVEN, [Seen(rows, seen, [15.0, 30.0])])
    assert left < 0.03
    assert found.step == pytest.approx(truth.step, rel=0.1)
    assert found.prefill == pytest.approx(truth.prefill, rel=0.1)
    assert found.hop_s == pytest.approx(truth.hop_s, rel=0.25)
    assert found.transfer_setup_s == World().transfer_setup_s, "not asked for"


def test_twice_as_slow_a_fleet_carries_half_as_much(tmp_path):
    arm = arms()["unpaced"]
    (tmp_path / "slow").mkdir()
    once = carried_rps(arm.fleet, Fitted(hop_s=1e-4).world(TABLES, EVEN, tmp_path), UNSEEN)
    slow = Fitted(step=2.0, prefill=2.0, decode=2.0, hop_s=2e-4).world(TABLES, EVEN, tmp_path / "slow")
    assert carried_rps(arm.fleet, slow, UNSEEN) == pytest.approx(once / 2, rel=0.02)
