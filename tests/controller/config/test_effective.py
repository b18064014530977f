"""Claims about the config that is shown: every default, and a cluster.yaml again."""

from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from cluster.fleet import (
    ControlSpec,
    Fleet,
    GatewaySpec,
    ModelSpec,
    NodeSpec,
    Pace,
    PipelineSpec,
    PolicySpec,
    ReplicaGroup,
    TelemetrySpec,
    TransportSpec,
)  # fmt: skip
from cluster.node import Market
from cluster.replica import Role
from cluster.schedule import Schedule
from cluster.slo import Slo
from controller.config import as_yaml, effective, parse_fleet

BASE = Path("/base")
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True)
words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=9)
paths = words.map(lambda word: str(Path("/") / word.replace("/", "_")))
seconds = st.floats(1e-9, 1e300)
counts = st.integers(0, 2**40)


def maybe(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.none() | strategy


schedules = st.builds(
    Schedule, start=st.sampled_from(["08:00", "00:00"]), end=st.sampled_from(["18:30", "24:00"]), max_replicas=counts
)
scaling = st.builds(dict, settle_s=seconds)
pipelines = st.builds(
    PipelineSpec,
    policies=st.lists(st.builds(PolicySpec, use=st.just("policies.scaling:Scaling"), settings=scaling), max_size=2).map(tuple),
    guards=st.lists(st.just(PolicySpec(use="policies.guards:RateOfChange")), max_size=2).map(tuple),
    expansion=st.builds(dict, drain_s=seconds),
)
nodes = st.builds(
    NodeSpec, name=names, zone=names, slots=maybe(counts), market=st.sampled_from(Market), price_usd_per_hour=seconds, cpus=seconds
)
paces = st.builds(Pace, shape=names, accelerator=names, speedup=seconds)
groups = st.builds(
    ReplicaGroup, role=st.sampled_from(Role), count=counts, min_replicas=maybe(counts), max_replicas=maybe(counts),
    startup_s=seconds, engine=st.sampled_from(["torch", "emulated"]), pool=names, pace=maybe(paces),
    schedules=st.lists(schedules, max_size=2).map(tuple),
)  # fmt: skip
fleets = st.builds(
    Fleet,
    name=names,
    models=st.tuples(st.builds(ModelSpec, name=words, path=paths, revision=words)),
    nodes=st.lists(nodes, min_size=1, max_size=2).map(tuple),
    replicas=st.lists(groups, min_size=1, max_size=2).map(tuple),
    gateway=st.builds(GatewaySpec, keys_file=maybe(paths), queue_timeout_s=seconds),
    transport=st.builds(TransportSpec, tls_dir=maybe(paths), kv_bytes_per_s=maybe(seconds)),
    control=st.builds(ControlSpec, pipeline=pipelines, challengers=st.dictionaries(words, pipelines, max_size=1)),
    telemetry=st.builds(TelemetrySpec, prometheus_url=maybe(words), local_prometheus=st.booleans()),
    slo=st.dictionaries(words, st.builds(Slo, ttft_s=maybe(seconds), tpot_s=maybe(seconds)), max_size=2),
)


@given(fleets)
def test_a_fleet_written_as_yaml_and_read_again_is_equal(fleet: Fleet):
    assert parse_fleet(as_yaml(fleet).encode(), BASE) == fleet


@given(fleets)
def test_the_effective_config_read_again_is_equal_and_comes_to_itself(fleet: Fleet):
    whole = effective(fleet)
    assert parse_fleet(as_yaml(whole).encode(), BASE) == whole
    assert effective(whole) == whole


def test_nothing_is_left_out():
    group = ReplicaGroup(role=Role.MIXED, count=2)
    fleet = Fleet(models=(ModelSpec(name="m", path="/m"),), replicas=(group,))
    whole = effective(fleet)
    assert whole.replicas == (msgspec.structs.replace(group, model="m", min_replicas=2, max_replicas=2),)
    assert whole.routing.settings["stale_s"] == 2.0
    assert whole.control.pipeline.policies[0] == PolicySpec(
        use="policies.hands:Hands", settings={"drain_s": 60.0, "emergency": True}
    )
    assert whole.control.pipeline.expansion["give_up_after"] == 5
