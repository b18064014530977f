"""The machines: their names and labels, what they are, and what they cost."""

from __future__ import annotations

from cluster.fleet import Fleet, NodeSpec
from cluster.hardware import ACCELERATORS
from controller.config.bounds import check_at_least, check_at_most, check_known, check_name, check_unique, placed
from controller.config.groups import MAX_REPLICAS


def check_nodes(fleet: Fleet) -> None:
    """Each by itself, and no name twice."""
    for index, node in enumerate(fleet.nodes):
        with placed(f"nodes[{index}]"):
            _check_node(node)
    check_unique([node.name for node in fleet.nodes], "nodes")


def _check_node(node: NodeSpec) -> None:
    check_name(node.name, "name")
    check_name(node.pool, "pool")
    for field in ("zone", "power_domain"):
        if label := getattr(node, field):
            check_name(label, field)
    check_known("accelerator", node.accelerator, ACCELERATORS, "accelerator")
    check_at_least(node.cpus, 0.1, "cpus")
    check_at_least(node.price_usd_per_hour, 0.0, "price_usd_per_hour")
    if node.slots is not None:
        check_at_least(node.slots, 1, "slots")
        check_at_most(node.slots, MAX_REPLICAS, "slots")
