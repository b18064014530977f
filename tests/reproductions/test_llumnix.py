"""Llumnix's fleet: freeness, live migration, priorities and scaling do what they are for."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from reproductions.llumnix import lost_s
from reproductions.llumnix.fleet import Design, Ended, Fleet, Scheduler, _fragmented
from reproductions.llumnix.instances import Seen, memory_blocks, step_times
from reproductions.llumnix.workload import LONGEST, MIXES, Asked, power_law, workload
from workloads.chance import stream

NOWHERE = Path("/nowhere")
LONG = MIXES[3]
TIMES = step_times(1.0)


def run(scheduler: Scheduler, requests: list[Asked], **more: object) -> Fleet:
    fleet = Fleet(Design(scheduler=scheduler, **more), TIMES)  # type: ignore[arg-type]
    fleet.run(requests)
    return fleet


def asked(rate: float = 4.8, count: int = 700, **more: float) -> list[Asked]:
    return workload(LONG, rate, count, 3, NOWHERE, **more)


@pytest.mark.parametrize("mean_tokens", [128, 256, 512])
def test_power_laws_have_their_mean_and_their_bound(mean_tokens: int) -> None:
    drawn = power_law(mean_tokens, 20_000, stream(1, "lengths"))
    assert drawn.min() >= 1
    assert drawn.max() <= LONGEST
    assert mean_tokens * 0.85 <= drawn.mean() <= mean_tokens * 1.02  # Clipping takes some of it.
    assert np.median(drawn) < drawn.mean() / 2


@pytest.mark.parametrize("scheduler", ["round robin", "load balancing", "llumnix"])
def test_every_request_is_served_once(scheduler: Scheduler) -> None:
    requests = asked()
    fleet = run(scheduler, requests)
    assert sorted(each.asked for each in fleet.ended) == sorted(requests)
    assert all(0.0 < each.ttft_s <= each.e2e_s for each in fleet.ended)


def test_the_same_requests_end_at_the_same_times() -> None:
    first, second = (run("llumnix", asked(count=300)).ended for _ in range(2))
    assert first == second


def test_freeness_and_migration_beat_turns_on_ttft() -> None:
    requests = asked(count=1500)
    turns, free = (run(scheduler, requests) for scheduler in ("round robin", "llumnix"))
    assert free.migrations > 0
    assert np.percentile([each.ttft_s for each in free.ended], 99) < np.percentile([each.ttft_s for each in turns.ended], 99)


def test_migration_gathers_scattered_memory() -> None:
    requests = asked(count=1500)
    balanced, free = (run(scheduler, requests) for scheduler in ("load balancing", "llumnix"))
    assert mean(free.fragmented) < mean(balanced.fragmented)


def test_free_memory_that_is_scattered_is_told_from_memory_that_is_not_there() -> None:
    whole = float(memory_blocks())
    blocked = Seen(used=whole - 100, head=150, waiting=150, running=10)
    full = Seen(used=whole, head=150, waiting=150, running=10)
    assert _fragmented([blocked, blocked]) == pytest.approx(150 / (2 * whole))  # 200 are free: one of the two could go on.
    assert _fragmented([full, full]) == 0.0
    assert _fragmented([Seen(used=0, head=150, waiting=150, running=1)]) == 0.0  # It will be taken up at once.


def test_high_priority_is_served_faster_than_the_rest() -> None:
    requests = workload(MIXES[1], 24.0, 1500, 0, NOWHERE, cv=2.0, high_share=0.1)
    plain, first = (run("llumnix", requests, priorities=priorities) for priorities in (False, True))
    e2e_s = [mean(each.e2e_s for each in fleet.ended if each.asked.high) for fleet in (plain, first)]
    assert e2e_s[1] < e2e_s[0]


def test_a_fleet_that_scales_has_fewer_instances_and_serves_all() -> None:
    requests = asked(rate=2.0)
    fleet = run("llumnix", requests, scale_at=10.0)
    assert len(fleet.ended) == len(requests)
    assert 1.0 < fleet.mean_instances < 16.0


def test_loss_by_preemption_is_what_preempted_requests_took_longer() -> None:
    usual = Ended(Asked(0.0, 10, 11), 1.0, 2.0, 0)
    preempted = Ended(Asked(0.0, 10, 11), 1.0, 5.0, 1)
    assert lost_s([usual, preempted]) == pytest.approx(3.0 / 2)
