"""Policies that a config names by import path."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, TypeVar

from cluster.errors import InvalidConfig

Policy = TypeVar("Policy")


def import_class(use: str, *, place: str) -> Any:
    """The class at `module:Class`. Raises InvalidConfig."""
    module, _, name = use.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # A module of the operator's own may raise anything while it is imported.
        raise InvalidConfig(f"{place}.use {use!r} cannot be imported as module:Class: {error}") from error


def make_policy(use: str, settings: Mapping[str, object], *, place: str, kind: type[Policy]) -> Policy:
    """Import the `module:Class` and build it.

    place: of the config, where `use` and `settings` stand; kind: the protocol, checkable at run time, that it must follow.
    Raises InvalidConfig.
    """
    policy = import_class(use, place=place)
    try:
        made = policy(**settings)
    except (TypeError, ValueError) as error:
        raise InvalidConfig(f"{place}.settings do not fit {use}: {error}") from error
    if not isinstance(made, kind):
        raise InvalidConfig(f"{place}.use {use!r} makes {type(made).__name__}, which is no {kind.__module__}.{kind.__name__}")
    return made
