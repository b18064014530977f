"""Limits that hold for a part of the week: the office's hours, the night."""

from __future__ import annotations

import datetime
import re
import zoneinfo

import msgspec

from cluster.ranges import at_least


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Narrower limits of a group for a part of the week."""

    days: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)
    """Monday is 0."""
    start: str
    """HH:MM on the wall clock of `timezone`."""
    end: str
    """HH:MM, at most 24:00; before `start` it means the next day."""
    timezone: str = "UTC"
    min_replicas: int | None = None
    max_replicas: int | None = None

    def __post_init__(self) -> None:
        _check_zone(self.timezone)
        _check_clock("start", self.start)
        _check_clock("end", self.end)
        if self.start == self.end:
            raise ValueError(f"end {self.end} is start: nothing lies between; a whole day ends at 24:00")
        if not self.days or not set(self.days) <= set(range(7)):
            raise ValueError(f"days {list(self.days)} are not some of 0 (Monday) to 6")
        low, high = self.min_replicas, self.max_replicas
        if low is None and high is None:
            raise ValueError("neither min_replicas nor max_replicas is given: it would limit nothing")
        at_least(0, min_replicas=low or 0, max_replicas=high or 0)
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_replicas {low} is above max_replicas {high}")

    def covers(self, now_s: float) -> bool:
        now = datetime.datetime.fromtimestamp(now_s, zoneinfo.ZoneInfo(self.timezone))
        minute = now.hour * 60 + now.minute
        start, end = _minute(self.start), _minute(self.end)
        if start <= end:
            return now.weekday() in self.days and start <= minute < end
        return (now.weekday() in self.days and minute >= start) or ((now.weekday() - 1) % 7 in self.days and minute < end)


def _check_zone(name: str) -> None:
    try:
        zoneinfo.ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:  # A folder of zones is an OSError.
        raise ValueError(f"timezone {name!r} is no known time zone, like UTC or Europe/Berlin") from error


def _check_clock(name: str, clock: str) -> None:
    if not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", clock, re.ASCII) and (name, clock) != ("end", "24:00"):
        raise ValueError(f"{name} {clock!r} is no time of day from 00:00 to {'24:00' if name == 'end' else '23:59'}")


def _minute(clock: str) -> int:
    hours, minutes = clock.split(":")
    return int(hours) * 60 + int(minutes)
