"""The router that a config names by its import path, ready to route."""

from __future__ import annotations

from cluster.fleet import RoutingSpec
from policies.import_path import make_policy
from policies.policy import Router


def make_router(spec: RoutingSpec) -> Router:
    """Build it, and have it compile what it compiles. Raises InvalidConfig for a bad path or unknown settings."""
    router = make_policy(spec.use, spec.settings, place="routing", kind=Router)
    warm = getattr(router, "warm", None)
    if warm is not None:
        warm()
    return router
