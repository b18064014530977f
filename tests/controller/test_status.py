"""What is said of a fleet to those who look."""

from __future__ import annotations

from cluster.actions import Decision
from cluster.fleet import Fleet, ModelSpec, ReplicaGroup
from cluster.replica import Membership, Role
from cluster.snapshot import Hold
from controller.status import fleet_status
from tests.policies.clusters import cluster, group

FLEET = Fleet(name="demo", models=(ModelSpec(name="m", path="/m"),), replicas=(ReplicaGroup(role=Role.MIXED),))


def test_a_node_that_is_cordoned_and_drained_is_told_to_be_drained():
    cordon, drain = (Hold(kind=kind, target="n0", author="ann", expires_s=9e9) for kind in ("cordon", "drain"))
    for holds in ((cordon, drain), (drain, cordon), (drain,)):
        status = fleet_status(
            FLEET, cluster([group()], holds=holds), Decision(), Membership(version=1, replicas=()), epoch=1, mode="act"
        )
        assert {node.name: node.held for node in status.nodes if node.held} == {"n0": "drain"}
