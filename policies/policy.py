"""The protocols of deciding."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from policies.route import Ask, Rejection, Route
from policies.routing_view import RoutingView


@runtime_checkable
class Router(Protocol):
    """Chooses for one request: filter, score, pick. Pure: same request, same view, same answer."""

    def route(self, ask: Ask, view: RoutingView) -> Route | Rejection: ...
