"""Claims about what a running fleet can become."""

import msgspec
import pytest

from cluster.errors import InvalidConfig
from cluster.fleet import ControlSpec, Fleet, ModelSpec, NodeSpec, Pace, PipelineSpec, PolicySpec, ReplicaGroup, TelemetrySpec
from cluster.node import Market
from cluster.replica import Role
from controller.reload import Difference, check_reload, differences

PACE = Pace(shape="llama-3.1-8b", accelerator="h100")
A, B = NodeSpec(name="a"), NodeSpec(name="b")
PREFILL = ReplicaGroup(role=Role.PREFILL, engine="emulated", pace=PACE)
DECODE = ReplicaGroup(role=Role.DECODE, engine="emulated", pace=PACE, count=2)
FLEET = Fleet(models=(ModelSpec(name="m", path="m"),), nodes=(A, B), replicas=(PREFILL, DECODE))
SCALING = "policies.scaling:Scaling"

with_ = msgspec.structs.replace


def control(**pipeline: object) -> Fleet:
    return with_(FLEET, control=ControlSpec(pipeline=PipelineSpec(**pipeline)))


LIVE = {
    "limits": (with_(FLEET, replicas=(PREFILL, with_(DECODE, max_replicas=8))), "replicas[1].max_replicas", 2, 8),
    "limits that the count follows": (with_(FLEET, replicas=(PREFILL, with_(DECODE, count=3))), "replicas[1].count", 2, 3),
    "start-up": (with_(FLEET, replicas=(PREFILL, with_(DECODE, startup_s=9.0))), "replicas[1].startup_s", 60.0, 9.0),
    "price": (with_(FLEET, nodes=(A, with_(B, price_usd_per_hour=2.5))), "nodes[1].price_usd_per_hour", 0.0, 2.5),
    "market": (with_(FLEET, nodes=(A, with_(B, market=Market.SPOT))), "nodes[1].market", "on_demand", "spot"),
    "mode": (with_(FLEET, control=ControlSpec(mode="advise")), "control.mode", "act", "advise"),
    "policy": (control(policies=(PolicySpec(use=SCALING),), guards=()), "control.pipeline.policies", None, None),
    "journal": (with_(FLEET, control=ControlSpec(journal_bytes=2**25)), "control.journal_bytes", 2**31, 2**25),
}
FIXED = {
    "name": (with_(FLEET, name="other"), "name: mobula to other"),
    "another node": (with_(FLEET, nodes=(A, B, NodeSpec(name="c"))), "nodes[2] of c: none to 9 settings"),
    "a node less": (with_(FLEET, nodes=(B,)), "nodes[0] of a: 9 settings to none"),
    "another model": (with_(FLEET, models=(ModelSpec(name="m", path="n"),)), "models[0].path of m: m to n"),
    "threads": (with_(FLEET, replicas=(PREFILL, with_(DECODE, threads=3))), "replicas[1].threads of m/decode/default: 1 to 3"),
    "KV": (with_(FLEET, replicas=(with_(PREFILL, kv_blocks=9), DECODE)), "replicas[0].kv_blocks of m/prefill/default: 2048 to 9"),
    "gateway": (with_(FLEET, gateway=with_(FLEET.gateway, port=9)), "gateway.port: 8000 to 9"),
    "port": (with_(FLEET, control=ControlSpec(http_port=9)), "control.http_port: 0 to 9"),
    "telemetry": (with_(FLEET, telemetry=TelemetrySpec(local_prometheus=True)), "telemetry.local_prometheus: False to True"),
}  # fmt: skip


def test_a_fleet_does_not_differ_from_itself():
    assert differences(FLEET, FLEET) == ()
    check_reload(FLEET, FLEET)


@pytest.mark.parametrize(("new", "path", "before", "after"), LIVE.values(), ids=LIVE.keys())
def test_what_the_controller_alone_goes_by_changes_while_the_fleet_runs(new: Fleet, path: str, before: object, after: object):
    found = differences(FLEET, new)
    assert found[0].path == path
    assert before is None or (found[0].old, found[0].new) == (before, after)
    assert all(difference.live for difference in found)
    check_reload(FLEET, new)


@pytest.mark.parametrize(("new", "words"), FIXED.values(), ids=FIXED.keys())
def test_what_processes_were_started_with_does_not(new: Fleet, words: str):
    with pytest.raises(InvalidConfig) as refused:
        check_reload(FLEET, new)
    assert str(refused.value) == f"{words} cannot be while the fleet runs; `mobula down` and `mobula up` change it"


def test_nodes_and_groups_are_known_by_name_wherever_they_stand():
    turned = with_(FLEET, nodes=(B, A), replicas=(with_(DECODE, max_replicas=3), PREFILL))
    assert differences(FLEET, turned) == (Difference(path="replicas[0].max_replicas", of="m/decode/default", old=2, new=3),)


def test_a_default_that_is_spelled_out_is_no_difference():
    spelled = with_(FLEET, replicas=(PREFILL, with_(DECODE, model="m", min_replicas=2, max_replicas=2)))
    policies = tuple(
        with_(one, settings={"settle_s": 30.0}) if one.use == SCALING else one for one in FLEET.control.pipeline.policies
    )
    assert differences(FLEET, with_(spelled, control=control(policies=policies).control)) == ()


def test_a_setting_of_a_policy_is_found_at_its_place():
    policies = tuple(
        with_(one, settings={"window": {"fall_s": 90.0}}) if one.use == SCALING else one for one in FLEET.control.pipeline.policies
    )
    path = "control.pipeline.policies[2].settings.window.fall_s"
    assert differences(FLEET, control(policies=policies)) == (Difference(path=path, old=180.0, new=90.0),)


def test_a_challenger_that_comes_and_goes_is_one_difference():
    with_one = with_(FLEET, control=ControlSpec(challengers={"bold": PipelineSpec()}))
    for old, new in ((FLEET, with_one), (with_one, FLEET)):
        (found,) = differences(old, new)
        assert (found.path, found.live) == ("control.challengers.bold", True)
