"""Limits for a part of the week."""

import datetime
import re

import pytest

from cluster.fleet import ReplicaGroup
from cluster.placement import limits_at
from cluster.replica import Role
from cluster.schedule import Schedule


def schedule(**changed: object) -> Schedule:
    return Schedule(**{"start": "08:00", "end": "18:30", "min_replicas": 1, **changed})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"timezone": "Europe/Berln"}, "timezone 'Europe/Berln' is no known time zone"),
        ({"timezone": "Europe"}, "timezone 'Europe' is no known time zone"),
        ({"timezone": "../UTC"}, "timezone '../UTC' is no known time zone"),
        ({"start": "8:00"}, "start '8:00' is no time of day from 00:00 to 23:59"),
        ({"start": "24:00"}, "start '24:00' is no time of day from 00:00 to 23:59"),
        ({"end": "24:01"}, "end '24:01' is no time of day from 00:00 to 24:00"),
        ({"end": "12:60"}, "end '12:60' is no time of day from 00:00 to 24:00"),
        ({"end": "18:30\n"}, "end '18:30\\n' is no time of day"),
        ({"start": "18:30"}, "end 18:30 is start: nothing lies between"),
        ({"days": (0, 7)}, "days [0, 7] are not some of 0 (Monday) to 6"),
        ({"days": ()}, "days [] are not some of 0 (Monday) to 6"),
        ({"min_replicas": None}, "neither min_replicas nor max_replicas is given"),
        ({"min_replicas": -1}, "min_replicas -1 is outside [0, inf)"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas 3 is above max_replicas 2"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(changed: dict, words: str):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        schedule(**changed)


def test_a_schedule_may_cover_whole_days():
    day = schedule(start="00:00", end="24:00", days=(0,))
    assert [day.covers(hour * 3600.0 + 345_600.0) for hour in (-1, 0, 12, 23, 24)] == [False, True, True, True, False]


def test_a_schedule_holds_in_its_own_time_zone():
    office = Schedule(days=(0, 1, 2, 3, 4), start="08:00", end="18:00", timezone="Europe/Berlin", min_replicas=6)
    group = ReplicaGroup(role=Role.DECODE, min_replicas=1, max_replicas=9, schedules=(office,))

    def low(year: int, month: int, day: int, hour: int) -> int:
        at = datetime.datetime(year, month, day, hour, 30, tzinfo=datetime.UTC)
        return limits_at(group, at.timestamp())[0]

    assert [low(2026, 7, 6, 6), low(2026, 1, 5, 6), low(2026, 1, 5, 7), low(2026, 7, 6, 16), low(2026, 7, 5, 9)] == [6, 1, 6, 1, 1]


def test_a_schedule_may_pass_midnight():
    night = Schedule(days=(4,), start="22:00", end="06:00", max_replicas=2)
    friday = datetime.datetime(2026, 7, 10, 23, 0, tzinfo=datetime.UTC).timestamp()
    assert [night.covers(friday + hours * 3600) for hours in (-2, 0, 6, 8, 24)] == [False, True, True, False, False]


def test_a_later_schedule_goes_before_an_earlier_one():
    day = Schedule(start="00:00", end="24:00", min_replicas=2, max_replicas=4)
    noon = Schedule(start="12:00", end="13:00", min_replicas=5)
    group = ReplicaGroup(role=Role.DECODE, min_replicas=1, max_replicas=9, schedules=(day, noon))
    assert [limits_at(group, hour * 3600.0) for hour in (11, 12, 13)] == [(2, 4), (5, 5), (2, 4)]


def test_of_two_that_leave_no_number_the_later_one_holds():
    day = Schedule(start="08:00", end="18:00", min_replicas=5)
    noon = Schedule(start="12:00", end="13:00", max_replicas=2)
    limits = [
        limits_at(ReplicaGroup(role=Role.DECODE, min_replicas=1, max_replicas=9, schedules=both), 12.5 * 3600)
        for both in ((day, noon), (noon, day))
    ]
    assert limits == [(2, 2), (5, 5)]
