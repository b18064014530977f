"""Whether a fleet can be: on any machine, and on this one."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet
from controller.config.bounds import check_name
from controller.config.control import check_control, check_telemetry
from controller.config.gateway import check_gateway, check_transport, router_of
from controller.config.groups import check_groups
from controller.config.models import check_checkpoint, check_model_names
from controller.config.nodes import check_nodes
from controller.config.reading import named
from controller.config.slo import check_slo
from controller.config.this_machine import check_this_machine


def check_fleet(path: Path, fleet: Fleet, *, here: bool = True, running: bool = False) -> None:
    """Raise InvalidConfig for the first thing in a cluster.yaml that cannot be.

    here: all of it will run on this machine. running: it does so already.
    """
    with named(path):
        check(fleet)
        if here:
            check_this_machine(fleet, running=running)
        elif fleet.telemetry.local_prometheus:
            raise InvalidConfig("telemetry.local_prometheus true: only a fleet on this machine gets a Prometheus beside it")


def check_unstarted(path: Path, fleet: Fleet) -> None:
    """The same for a fleet that nobody starts, to simulate it: neither its files nor this machine are looked at."""
    with named(path):
        check(fleet, files=False)


def check(fleet: Fleet, *, files: bool = True) -> None:
    """Raise InvalidConfig for the first thing that cannot be on any machine. files: those that it names must be there."""
    check_name(fleet.name, "name")
    for field in ("models", "nodes", "replicas"):
        if not getattr(fleet, field):
            raise InvalidConfig(f"{field} is empty; at least 1 is needed")
    check_model_names(fleet)
    check_nodes(fleet)
    check_groups(fleet)
    check_gateway(fleet.gateway, files=files)
    check_transport(fleet, files=files)
    router_of(fleet)
    check_slo(fleet)
    check_control(fleet)
    check_telemetry(fleet.telemetry)
    for model in fleet.models if files else ():
        check_checkpoint(fleet, model)
