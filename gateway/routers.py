"""The router that a config names by its import path."""

from __future__ import annotations

import importlib

from cluster.errors import InvalidConfig
from cluster.fleet import RoutingSpec
from policies.policy import Router


def make_router(spec: RoutingSpec) -> Router:
    """Import and build it, and have it compile what it compiles. Raises InvalidConfig for a bad path or unknown settings."""
    module, _, name = spec.use.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
        router: Router = kind(**spec.settings)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise InvalidConfig(f"routing.use {spec.use} with settings {spec.settings}: {error}") from error
    warm = getattr(router, "warm", None)
    if warm is not None:
        warm()
    return router
