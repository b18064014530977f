"""Machines: what they are, what they cost, and what they share."""

from __future__ import annotations

import enum

import msgspec


class Market(enum.Enum):
    """How a node is paid for. SPOT may be taken away at short notice."""

    ON_DEMAND = "on_demand"
    SPOT = "spot"


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One machine."""

    name: str
    pool: str
    accelerator: str = "cpu"
    market: Market = Market.ON_DEMAND
    zone: str = ""
    power_domain: str = ""
    price_usd_per_hour: float = 0.0
    slots: int
    """Replicas it can host."""
    alive: bool = True
