"""Times and durations as operators write and read them."""

from __future__ import annotations

import datetime
import re

from cluster.errors import InvalidConfig

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
DAY_S = UNITS_S["d"]
LAST_OF_SECOND_S = 0.999_9

_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)(?::([0-5]\d))?")


def duration(text: str, flag: str) -> float:
    """Seconds of `90s`, `30m`, `2h` or `1d`. Raises InvalidConfig for what is none; `flag` is where it stands."""
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise InvalidConfig(f"{flag} {text!r} is no duration such as 90s, 30m, 2h or 1d")
    return float(found[1]) * UNITS_S[found[2]]


def until(text: str, now_s: float, flag: str) -> float:
    """A moment up to the end of the second that is written: passes are listed by theirs without its fractions."""
    at_s = moment(text, now_s, flag)
    return at_s if _DURATION.fullmatch(text.strip().removeprefix("-")) or at_s % 1 else at_s + LAST_OF_SECOND_S


def moment(text: str, now_s: float, flag: str) -> float:
    """Unix seconds of `-5m`, of the last `HH:MM[:SS]` on the local clock, or of an ISO 8601 time, local where it names no zone.

    Raises InvalidConfig for what is none.
    """
    text = text.strip()
    if _DURATION.fullmatch(text.removeprefix("-")):
        return now_s - duration(text.removeprefix("-"), flag)
    if found := _CLOCK.fullmatch(text):
        hour, minute, second = (int(part or 0) for part in found.groups())
        now = datetime.datetime.fromtimestamp(now_s)
        today = now.replace(hour=hour, minute=minute, second=second, microsecond=0)
        return (today if today <= now else today - datetime.timedelta(days=1)).timestamp()
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise InvalidConfig(f"{flag} {text!r} is no time such as -5m, 03:12, 03:12:44 or 2026-01-31T03:12:44Z") from error


def clock(at_s: float, now_s: float) -> str:
    """The local time of day, with its date on another day than today."""
    at, now = datetime.datetime.fromtimestamp(at_s), datetime.datetime.fromtimestamp(now_s)
    return at.strftime("%H:%M:%S" if at.date() == now.date() else "%Y-%m-%d %H:%M:%S")


def spell(span_s: float) -> str:
    """A duration in its two biggest units: `42 s`, `5 min`, `2 h 10 min`, `3 d 4 h`."""
    left, words = round(span_s), []
    for unit, size in (("d", DAY_S), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= size:
            words.append(f"{left // size} {unit}")
            left %= size
    return " ".join(words[:2]) or "0 s"
