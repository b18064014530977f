"""Times and durations as operators write and read them."""

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.times import clock, duration, moment, spell, until
from cluster.errors import InvalidConfig

NOW = datetime.datetime(2026, 3, 14, 15, 9, 26)
NOW_S = NOW.timestamp()


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("15:00", NOW.replace(minute=0, second=0)),
        ("3:07:11", NOW.replace(hour=3, minute=7, second=11)),
        ("15:10", NOW.replace(day=13, minute=10, second=0)),
        ("2026-03-01T10:00", datetime.datetime(2026, 3, 1, 10)),
        ("2026-03-01T10:00:00Z", datetime.datetime(2026, 3, 1, 10, tzinfo=datetime.UTC)),
        ("2026-03-01T10:00+02:00", datetime.datetime(2026, 3, 1, 8, tzinfo=datetime.UTC)),
        ("-5m", NOW - datetime.timedelta(minutes=5)),
        ("2h", NOW - datetime.timedelta(hours=2)),
        ("-1.5d", NOW - datetime.timedelta(hours=36)),
    ],
)
def test_time_is_read_as_iso_as_clock_or_as_ago(text: str, at: datetime.datetime):
    assert moment(text, NOW_S, "--at") == at.timestamp()


@pytest.mark.parametrize("text", ["", "soon", "25:00", "12:60", "5", "-5y", "2026-13-01", "5m ago", "12:3"])
def test_what_is_no_time_is_refused_with_its_flag(text: str):
    with pytest.raises(InvalidConfig, match=r"^--at .* is no time such as -5m"):
        moment(text, NOW_S, "--at")


@pytest.mark.parametrize("text", ["", "1", "-1h", "h", "1w", "1h30m", "inf", "1e3s"])
def test_what_is_no_duration_is_refused_with_its_flag(text: str):
    with pytest.raises(InvalidConfig, match=r"^--for .* is no duration such as 90s"):
        duration(text, "--for")


@pytest.mark.parametrize(
    ("text", "fraction"), [("3:07:11", 0.999_9), ("2026-03-01T10:00:00Z", 0.999_9), ("2026-03-01T10:00:00.25Z", 0), ("-5m", 0)]
)
def test_until_a_second_is_until_its_end(text: str, fraction: float):
    assert until(text, NOW_S, "--at") == moment(text, NOW_S, "--at") + fraction


def test_another_day_is_named():
    assert clock(NOW_S - 60, NOW_S) == "15:08:26"
    assert clock(NOW_S - 86400, NOW_S) == "2026-03-13 15:09:26"


@pytest.mark.parametrize(
    ("span_s", "said"),
    [
        (0, "0 s"),
        (42, "42 s"),
        (60, "1 min"),
        (3599, "59 min 59 s"),
        (7800, "2 h 10 min"),
        (273_600, "3 d 4 h"),
        (90_061, "1 d 1 h"),
    ],
)
def test_span_is_said_in_its_two_biggest_units(span_s: float, said: str):
    assert spell(span_s) == said


@given(st.floats(0, 1e8), st.sampled_from("smhd"))
def test_clock_never_points_ahead(number: float, unit: str):
    assert moment(f"-{number:.2f}{unit}", NOW_S, "--at") <= NOW_S
