"""What is said of a fleet to those who look."""

from __future__ import annotations

import msgspec

from cluster.actions import Decision, Dropped, Reason, ScaleRole
from cluster.fleet import Fleet, ModelSpec, ReplicaGroup
from cluster.replica import Membership, Phase, Role
from cluster.snapshot import ClusterSnapshot, Hold
from controller.status import FleetStatus, fleet_status
from tests.policies.clusters import cluster, group, steady

FLEET = Fleet(name="demo", models=(ModelSpec(name="m", path="/m"),), replicas=(ReplicaGroup(role=Role.MIXED),))


def test_a_node_that_is_cordoned_and_drained_is_told_to_be_drained():
    cordon, drain = (Hold(kind=kind, target="n0", author="ann", expires_s=9e9) for kind in ("cordon", "drain"))
    for holds in ((cordon, drain), (drain, cordon), (drain,)):
        status = fleet_status(
            FLEET, cluster([group()], holds=holds), Decision(), Membership(version=1, replicas=()), 15.0, epoch=1, mode="act"
        )
        assert {node.name: node.held for node in status.nodes if node.held} == {"n0": "drain"}


def status(snapshot: ClusterSnapshot, decision: Decision) -> FleetStatus:
    return fleet_status(FLEET, snapshot, decision, Membership(version=1, replicas=()), 15.0, epoch=1, mode="act")


def test_what_guards_stop_is_told_and_a_wish_for_what_is_already_is_not():
    kept, more = (ScaleRole(group="m/mixed/p", replicas=count, reason=Reason(text="")) for count in (1, 2))
    dropped = tuple(Dropped(action=action, by="Paused", why="paused by ann") for action in (kept, more))
    (held,) = status(cluster([group()]), Decision(dropped=dropped)).held_back
    assert (held.text, held.by, held.why) == ("m/mixed/p to 2", "Paused", "paused by ann")


def test_a_replica_that_is_lost_before_it_served_has_failed():
    seen = cluster([group()])
    lost = [msgspec.structs.replace(seen.replicas[0], phase=Phase.LOST, ready_since_s=ready_s) for ready_s in (None, 5.0)]
    phases = [status(msgspec.structs.replace(seen, replicas=(one,)), Decision()).replicas[0].phase for one in lost]
    assert phases == ["failed", "lost"]


def test_a_wish_to_stay_that_finds_no_place_is_told():
    kept = ScaleRole(group="m/mixed/p", replicas=1, reason=Reason(text=""))
    unplaced = Dropped(action=kept, by="Expansion", why="1 of 1 not started: no room")
    assert [held.why for held in status(cluster([group()]), Decision(dropped=(unplaced,))).held_back] == [unplaced.why]


def test_telemetry_is_stale_when_the_guard_says_so():
    ages = [status(cluster([group()], [steady(1.0, age_s=age_s)]), Decision()).models[0].stale for age_s in (14.0, 16.0)]
    assert ages == [False, True]
