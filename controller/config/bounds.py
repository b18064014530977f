"""Refusals of single values, each with the value, the bound and the place."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Collection, Iterator, Sequence

from cluster.errors import InvalidConfig
from controller.spelling import did_you_mean

MAX_NAME_CHARS = 40  # Names become directory, actor and metric names; a Unix socket's path has 107 characters.
MAX_PORT = 65_535

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(name: str, place: str) -> None:
    """Of what gets files, actors and series named after it."""
    if len(name) > MAX_NAME_CHARS:
        raise InvalidConfig(f"{place} has {len(name)} characters, above {MAX_NAME_CHARS}")
    if not _NAME.fullmatch(name):
        raise InvalidConfig(f"{place} {name!r} is not made of letters, digits, `.`, `_` and `-`")


def check_known(what: str, name: str, known: Collection[str], place: str) -> None:
    """Of names in a catalogue of ours."""
    if name not in known:
        raise InvalidConfig(f"{place} {name} is no known {what}{did_you_mean(name, known)}")


def check_unique(names: Sequence[str], field: str) -> None:
    """Of the names of a list's items."""
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        if first.setdefault(name, index) != index:
            raise InvalidConfig(f"{field}[{index}].name {name} is taken by {field}[{first[name]}]; names are given once")


def check_at_least(value: float, low: float, place: str) -> None:
    """Of finite numbers."""
    if math.isnan(value):
        raise InvalidConfig(f"{place} {value} is no number")
    if value < low:
        raise InvalidConfig(f"{place} {value} is below {low}")
    check_at_most(value, sys.float_info.max, place)


def check_at_most(value: float, high: float, place: str) -> None:
    """Of numbers that are some."""
    if value > high:
        raise InvalidConfig(f"{place} {value} is above {high}")


def check_positive(value: float, place: str) -> None:
    """Of finite numbers."""
    if not (value > 0 and math.isfinite(value)):
        raise InvalidConfig(f"{place} {value} is not a finite number above 0")


def check_port(port: int, low: int, place: str) -> None:
    """low: 0 where the system may choose one, else 1."""
    if not low <= port <= MAX_PORT:
        raise InvalidConfig(f"{place} {port} is outside [{low}, {MAX_PORT}]")


@contextlib.contextmanager
def placed(place: str) -> Iterator[None]:
    """A field's error with the place of what has the field."""
    try:
        yield
    except InvalidConfig as error:
        raise InvalidConfig(f"{place}.{error}") from error
