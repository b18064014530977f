"""What a file comes to: the same fleet with every default spelled out, those of policies included, and as YAML."""

from __future__ import annotations

import msgspec
import yaml

from cluster.fleet import ControlSpec, Fleet, ReplicaGroup, RoutingSpec
from cluster.placement import limits_of
from controller.config.control import pipelines_of
from controller.config.gateway import router_of
from controller.config.groups import model_of
from controller.pipelines import spelled_out

WIDTH = 100

_set = msgspec.structs.replace


def effective(fleet: Fleet) -> Fleet:
    """The fleet that behaves the same and leaves nothing out. Raises InvalidConfig for a policy that cannot be made."""
    return _set(
        fleet,
        replicas=tuple(_group(fleet, group) for group in fleet.replicas),
        routing=RoutingSpec(use=fleet.routing.use, settings={**fleet.routing.settings, **_numbers(router_of(fleet))}),
        control=_control(fleet.control),
    )


def as_yaml(fleet: Fleet) -> str:
    """Read again, it gives an equal fleet."""
    return yaml.dump(msgspec.to_builtins(fleet), Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True, width=WIDTH)


def _group(fleet: Fleet, group: ReplicaGroup) -> ReplicaGroup:
    low, high = limits_of(group)
    return _set(group, model=model_of(fleet, group).name, min_replicas=low, max_replicas=high)


def _numbers(router: object) -> dict[str, float]:
    """The fields of a router that is a struct. Others keep theirs to themselves."""
    fields = msgspec.structs.asdict(router) if isinstance(router, msgspec.Struct) else {}
    return {name: value for name, value in fields.items() if isinstance(value, int | float)}


def _control(control: ControlSpec) -> ControlSpec:
    pipeline, *challengers = (spelled_out(spec, place) for place, spec in pipelines_of(control).items())
    return _set(control, pipeline=pipeline, challengers=dict(zip(control.challengers, challengers, strict=True)))
