"""Keys and words that no type knows, refused with their place and what is like them: msgspec would name neither."""

from __future__ import annotations

import difflib
import enum
import types
import typing
from collections.abc import Iterable

import msgspec

from cluster.errors import InvalidConfig


def check_spelling(plain: object, kind: object, place: str) -> None:
    """Raise InvalidConfig for the first key or word of plain data that its type does not have. place: the data's, "" for a file."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if (origin is list or (origin is tuple and arguments[-1] is Ellipsis)) and isinstance(plain, list):
        for index, item in enumerate(plain):
            check_spelling(item, arguments[0], f"{place}[{index}]")
    elif origin is dict and isinstance(plain, dict):
        for key, value in plain.items():
            check_spelling(value, arguments[1], f"{place}.{key}")
    elif origin in (types.UnionType, typing.Union):
        for choice in arguments:
            check_spelling(plain, choice, place)
    elif origin is typing.Literal:
        _check_word(plain, arguments, place)
    elif isinstance(kind, type) and issubclass(kind, enum.Enum):
        _check_word(plain, [member.value for member in kind], place)
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(plain, dict):
        hints = typing.get_type_hints(kind)
        for key, value in plain.items():
            where = f"{place}.{key}" if place else str(key)
            if key not in hints:
                raise InvalidConfig(f"unknown key `{where}`{did_you_mean(str(key), hints)}")
            check_spelling(value, hints[key], where)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a refusal: the nearest names, or all there are."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=3)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; known here: {', '.join(names)}" if names else ""


def _check_word(plain: object, words: Iterable[object], place: str) -> None:
    """Other types are left to msgspec, which names the type that it wants."""
    known = [word for word in words if isinstance(word, str)]
    if isinstance(plain, str) and plain not in known:
        raise InvalidConfig(f"{place} {plain!r} is none of {', '.join(known)}{_nearest(plain, known)}")


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
