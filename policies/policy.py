"""The protocols of deciding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import msgspec

from cluster.actions import Action, Dropped
from cluster.snapshot import ClusterSnapshot
from policies.route import Ask, Rejection, Route
from policies.routing_view import RoutingView


@runtime_checkable
class Router(Protocol):
    """Chooses for one request: filter, score, pick. Pure: same request, same view, same answer."""

    def route(self, ask: Ask, view: RoutingView) -> Route | Rejection: ...


class Policy(Protocol):
    """Proposes. Pure: same snapshot, same answer. A frozen class whose fields are its config."""

    emergency: bool
    """Goes before all that are not, whatever the order in the config."""

    def decide(self, snapshot: ClusterSnapshot, accepted: Sequence[Action]) -> Sequence[Action]: ...


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a guard lets pass."""

    actions: tuple[Action, ...]
    dropped: tuple[Dropped, ...] = ()
    """What it stopped or weakened, as it was proposed."""


class Guard(Protocol):
    """Limits. May only drop or weaken, never add or strengthen."""

    def limit(self, snapshot: ClusterSnapshot, actions: Sequence[Action]) -> Verdict: ...
