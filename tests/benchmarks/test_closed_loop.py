"""The default pipeline over real engines in virtual time: quiet at a constant load, quick in a burst."""

import itertools
import math

import pytest

from benchmarks.burst_virtual import to_slo_s
from benchmarks.closed_loop import ClosedLoop, Count, Ended, PipelineScaler, QueueRule, Setting


async def run(steps: list[tuple[float, float]], replicas: int, seed: int = 1, scaler=None) -> ClosedLoop:
    setting = Setting(replicas=replicas)
    loop = ClosedLoop(setting, setting.rows(steps, seed), scaler or PipelineScaler())
    await loop.run(sum(seconds for _, seconds in steps))
    return loop


def changes(counts: list[Count]) -> list[tuple[float, int]]:
    """(seconds, replicas wanted) at each change."""
    return [(late.at_s, late.wanted) for early, late in itertools.pairwise(counts) if late.wanted != early.wanted]


@pytest.mark.parametrize(("rate_rps", "replicas"), [(1.0, 1), (3.0, 2), (5.0, 3)])
async def test_constant_load_is_left_alone_and_served_inside_its_slo(rate_rps, replicas):
    loop = await run([(rate_rps, 300.0)], replicas)
    assert changes(loop.counts) == []
    assert sum(one.kept for one in loop.ended) > 0.97 * len(loop.ended)


async def test_fleet_too_large_shrinks_and_does_not_come_back():
    loop = await run([(2.0, 450.0)], 5)
    wanted = [count for _, count in changes(loop.counts)]
    assert wanted[-1] in (1, 2)
    assert wanted == sorted(wanted, reverse=True)


async def test_burst_is_answered_before_the_first_newcomer_could_be_ready():
    loop = await run([(2.0, 120.0), (8.0, 210.0)], 2)
    rises = [at_s for at_s, _ in changes(loop.counts)]
    assert 120.0 < rises[0] < 120.0 + Setting().startup_s / 2
    late = [one for one in loop.ended if one.arrival_s > 120.0 + 120.0]
    assert sum(one.kept for one in late) > 0.97 * len(late)


async def test_replica_drains_until_its_last_stream_and_no_request_is_lost():
    loop = await run([(2.0, 185.0), (0.0, 60.0)], 5)
    assert loop.in_flight == 0
    assert all(one.ttft_s is not None for one in loop.ended)
    assert loop.counts[-1].held < 5


def test_queue_rule_takes_kubernetes_defaults():
    rule = QueueRule(10.0)
    asks = [(0.0, 20, 2), (15.0, 21, 2), (30.0, 40, 2), (45.0, 900, 4), (60.0, 10, 8), (345.0, 10, 8), (360.0, 10, 8)]
    answers = [rule._wanted(at_s, in_flight, current, most=64) for at_s, in_flight, current in asks]
    assert answers == [2, 2, 4, 8, 8, 8, 1]


def test_slo_is_met_again_after_the_last_bad_seconds():
    def ended(at_s: float, kept: bool) -> Ended:
        return Ended(400.0 + at_s, 0.1, kept)

    assert to_slo_s([ended(1.0, True)]) == 0.0
    assert to_slo_s([ended(1.0, False), ended(7.0, True), ended(12.0, False), ended(17.0, True)]) == 15.0
    assert math.isclose(to_slo_s([ended(1.0, True)] * 20 + [ended(2.0, False)]), 0.0)
