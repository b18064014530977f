"""Which part of a model's flow each of its groups is to carry: what must be there, what is, then more; the cheapest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from cluster.replica import Role
from cluster.slo import Slo
from cluster.snapshot import ClusterSnapshot, Group
from policies.flow import Flow
from policies.sizing import Bounds, Fits, decode_fits, prefill_fits

HALVINGS = 20  # Of the interval in which a capacity lies: to a millionth of the flow.


def shares(snapshot: ClusterSnapshot, model: str, flow: Flow, slo: Slo, bounds: Bounds) -> Mapping[str, float]:
    """Share of the model's flow, by group name. Of all that decode they sum to 1; prefill groups carry the decode groups' part."""
    groups = [group for group in snapshot.groups if group.model == model and group.performance is not None]
    decoding = _split(snapshot, [group for group in groups if group.role.decodes], 1.0, flow, slo, bounds)
    apart = sum(decoding[group.name] for group in groups if group.role is Role.DECODE)
    prefilling = _split(snapshot, [group for group in groups if _prefills(group, groups)], apart, flow, slo, bounds)
    return {**decoding, **prefilling}


def fits_of(snapshot: ClusterSnapshot, group: Group, flow: Flow, slo: Slo, bounds: Bounds) -> Fits:
    """What a group's role asks of a number of replicas. Decode replicas prefill too where nobody else is wanted to."""
    if group.role is Role.PREFILL:
        return partial(prefill_fits, group, flow, slo, bounds)
    return partial(
        decode_fits, group, flow, slo, bounds, prefilling=group.role is Role.MIXED or not prefilled_apart(snapshot, group.model)
    )


def prefilled_apart(snapshot: ClusterSnapshot, model: str) -> bool:
    return any(group.model == model and group.role is Role.PREFILL and group.wanted > 0 for group in snapshot.groups)


def _prefills(group: Group, groups: Sequence[Group]) -> bool:
    """Not one at 0 beside one that decodes on the same replicas: whether to prefill apart there is for `disaggregation` to say."""
    if group.role is not Role.PREFILL:
        return False
    alike = (other for other in groups if other.role is Role.DECODE and (other.pool, other.build) == (group.pool, group.build))
    return group.wanted > 0 or not any(alike)


def _split(
    snapshot: ClusterSnapshot, groups: Sequence[Group], whole: float, flow: Flow, slo: Slo, bounds: Bounds
) -> dict[str, float]:
    if len(groups) == 1 or flow.rate_rps <= 0.0:
        return {group.name: whole if index == 0 else 0.0 for index, group in enumerate(groups)}
    given = dict.fromkeys((group.name for group in groups), 0.0)
    left = whole
    cheapest = sorted(groups, key=lambda group: _price_of_capacity(snapshot, group, flow, slo, bounds))
    for replicas in (_must, _wanted, _may):
        for group in cheapest:
            most = capacity(snapshot, group, replicas(group), flow, slo, bounds) - given[group.name]
            more = min(left, max(0.0, most))
            given[group.name] += more
            left -= more
    if left > 0.0:  # Nobody can carry it: everyone is asked for more than it has, and the limits say the rest.
        share = {name: part / (whole - left) if whole > left else 1.0 / len(groups) for name, part in given.items()}
        given = {name: part + left * share[name] for name, part in given.items()}
    return given


def _must(group: Group) -> int:
    """What must stay anyway costs nothing more."""
    return group.min_replicas


def _wanted(group: Group) -> int:
    """What is there goes before what would have to be started: else a price that is nearly another's would move replicas about."""
    return min(max(group.wanted, group.min_replicas), group.max_replicas)


def _may(group: Group) -> int:
    return group.max_replicas


def capacity(snapshot: ClusterSnapshot, group: Group, replicas: int, flow: Flow, slo: Slo, bounds: Bounds) -> float:
    """The largest multiple of the flow, in [0, 1], that so many replicas of the group carry."""

    def holds(factor: float) -> bool:
        return fits_of(snapshot, group, flow.times(factor), slo, bounds)(replicas).holds

    if holds(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _price_of_capacity(snapshot: ClusterSnapshot, group: Group, flow: Flow, slo: Slo, bounds: Bounds) -> tuple[float, str]:
    """Dollars per hour for carrying the flow, by one replica's capacity; equal ones in the order of their names."""
    carried = capacity(snapshot, group, 1, flow, slo, bounds)
    return (price_usd_per_hour(snapshot, group.pool) / max(carried, 1e-9), group.name)


def price_usd_per_hour(snapshot: ClusterSnapshot, pool: str) -> float:
    """Mean price of a replica's place in the pool; 0 where prices were not given."""
    nodes = [node for node in snapshot.nodes if node.pool == pool and node.slots > 0]
    prices = [node.price_usd_per_hour / node.slots for node in nodes]
    return sum(prices) / len(prices) if prices else 0.0
