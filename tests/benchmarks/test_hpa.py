"""The queue-length rule: Kubernetes' arithmetic, with its defaults."""

import pytest

from benchmarks.hpa import QueueLength
from cluster.replica import Role
from cluster.slo import Slo
from cluster.snapshot import ClusterSnapshot, Group, Workload


def wanted(in_flight: int, current: int, pass_number: int = 15, most: int = 100) -> int:
    group = Group(
        model="m",
        role=Role.MIXED,
        pool="a",
        min_replicas=1,
        max_replicas=most,
        wanted=current,
        performance=None,
        kv_tokens=1,
        max_running=1,
        step_budget_tokens=1,
        startup_s=1.0,
    )
    workload = Workload(model="m", slo=Slo(), bucket_s=1.0, buckets=(), in_flight=in_flight)
    snapshot = ClusterSnapshot(now_s=1000.0, pass_number=pass_number, groups=(group,), workloads=(workload,))
    (action,) = QueueLength().decide(snapshot, ())
    return action.replicas


def test_replicas_are_what_the_target_divides_the_requests_in_flight_into():
    assert wanted(in_flight=13, current=5) == 7


def test_a_tenth_off_the_target_is_left_alone():
    assert wanted(in_flight=21, current=10) == 10
    assert wanted(in_flight=23, current=10) == 12


@pytest.mark.parametrize(("current", "reached"), [(1, 5), (3, 7), (4, 8), (20, 40)])
def test_a_period_adds_four_or_doubles(current, reached):
    assert wanted(in_flight=1000, current=current) == reached


def test_nothing_is_done_between_periods():
    assert [wanted(in_flight=1000, current=3, pass_number=number) for number in (14, 16, 29)] == [3, 3, 3]


def test_the_most_is_never_exceeded():
    assert wanted(in_flight=1000, current=9, most=10) == 10


def test_a_run_of_five_minutes_never_goes_down():
    assert wanted(in_flight=0, current=9) == 9
