"""One snapshot from what was heard."""

import math

import msgspec
import pytest

from cluster.fleet import Fleet, ModelSpec, NodeSpec, ReplicaGroup
from cluster.node import Market
from cluster.performance import PerformanceModel
from cluster.replica import Load, Phase, Replica, Role
from cluster.schedule import Schedule
from cluster.slo import Slo
from controller.memory import GroupMemory, Memory
from controller.observe.assemble import BUCKETS, Heard, Seen, assemble
from controller.observe.counters import Series
from tests.policies.clusters import H100_8B, NOW_S

FLEET = Fleet(
    models=(ModelSpec(name="m", path="m"),),
    nodes=(NodeSpec(name="a", pool="p", zone="z", market=Market.SPOT, price_usd_per_hour=3.0), NodeSpec(name="b", pool="q")),
    replicas=(
        ReplicaGroup(role=Role.DECODE, pool="p", count=2, max_replicas=5),
        ReplicaGroup(role=Role.PREFILL, pool="q", min_replicas=0),
    ),
    slo={"default": Slo(ttft_s=0.5, tpot_s=0.05)},
)


def member(name: str, role: Role = Role.DECODE, node: str = "a", phase: Phase = Phase.READY) -> Replica:
    return Replica(
        replica_id=name,
        worker_id=f"worker-of-{name}",
        node=node,
        endpoint="127.0.0.1:1",
        role=role,
        phase=phase,
        model="m",
        engine="emulated",
        performance=H100_8B,
        kv_blocks=100,
        context_tokens=4096,
        max_running=8,
        step_budget_tokens=512,
    )


def load(name: str, **more: float) -> Load:
    fields = {
        "sequence": 1,
        "at_s": NOW_S,
        "phase": Phase.READY,
        "running": 4,
        "waiting": 0,
        "waiting_tokens": 0,
        "kv_tokens": 4000,
    }
    return Load(replica_id=name, kv_blocks_used=250, **{**fields, **more})


def counters(
    rate_rps: float, until_s: float = NOW_S, gateway: str = "g:1", start_s: float = NOW_S - 400
) -> dict[str, list[Series]]:
    """A gateway that has served 100-token prompts, a quarter cached, and 20-token answers, all within 0.1 s."""
    times_s = tuple(start_s + step for step in range(round(until_s - start_s) + 1))

    def rising(name: str, by: float, **labels: str) -> Series:
        labels = {"instance": gateway, "model": "m", **labels}
        return Series(name=name, labels=labels, times_s=times_s, values=tuple(by * rate_rps * (at_s - start_s) for at_s in times_s))

    per_request = {
        "mobula_arrivals_total": 1,
        "mobula_arrived_prompt_tokens_total": 100,
        "mobula_arrived_prompt_tokens_squared_total": 10_000,
        "mobula_request_prompt_tokens_sum": 100,
        "mobula_cached_tokens_total": 25,
        "mobula_request_output_tokens_sum": 20,
        "mobula_request_output_tokens_count": 1,
    }
    made = {name: [rising(name, by)] for name, by in per_request.items()}
    for name in ("mobula_ttft_seconds_bucket", "mobula_tpot_seconds_bucket"):
        made[name] = [rising(name, by, le=str(bound)) for bound, by in ((0.01, 0), (0.1, 1), (math.inf, 1))]
    made["mobula_queue_depth"] = [Series(name="mobula_queue_depth", labels={"model": "m"}, times_s=times_s[-1:], values=(7.0,))]
    return made


def build(replicas=(), heard=(), telemetry=None, memory=None, now_s=NOW_S, alive=("a", "b")):
    reports = {one.replica_id: Heard(load=one, at_s=NOW_S - 0.14) for one in heard}
    seen = Seen(replicas=tuple(replicas), heard=reports, alive=frozenset(alive))
    return assemble(FLEET, seen, telemetry or {}, memory or Memory(), now_s)


def test_groups_are_those_of_the_config_and_know_what_their_replicas_said():
    snapshot = build([member("d0"), member("d1")])
    decode, prefill = snapshot.groups
    assert (decode.name, decode.min_replicas, decode.max_replicas, decode.wanted) == ("m/decode/p", 2, 5, 2)
    assert (prefill.name, prefill.min_replicas, prefill.max_replicas) == ("m/prefill/q", 0, 1)
    assert (decode.performance, prefill.performance) == (H100_8B, None)
    assert [one.replica_id for one in snapshot.replicas_by_group["m/decode/p"]] == ["d0", "d1"]


def test_memory_goes_before_the_config():
    known = GroupMemory(wanted=4, startup_s=12.5, changed_up_s=NOW_S - 5)
    decode = build(memory=Memory(groups={"m/decode/p": known}, pass_number=9)).groups[0]
    assert (decode.wanted, decode.startup_s, decode.changed_up_s) == (4, 12.5, NOW_S - 5)


def test_clock_that_steps_back_does_not_turn_time_round():
    assert build(memory=Memory(now_s=NOW_S + 50)).now_s == NOW_S + 50.001


def test_demand_is_what_arrived_second_by_second():
    (workload,) = build(telemetry=counters(4.0)).workloads
    assert len(workload.buckets) == BUCKETS
    last = workload.buckets[-1]
    assert (last.requests, last.prompt_tokens, last.cached_tokens, last.output_tokens) == pytest.approx((4.0, 300.0, 100.0, 80.0))
    assert (workload.age_s, workload.queued) == (0.0, 7)
    assert 0.01 < workload.ttft.p99_s <= 0.1
    assert workload.attainment == pytest.approx(0.44, abs=0.01)


def test_past_that_nobody_watched_is_not_taken_for_quiet():
    assert len(build(telemetry=counters(4.0, start_s=NOW_S - 17)).workloads[0].buckets) == 17


def test_silence_of_the_gateways_ages():
    assert build(telemetry=counters(4.0, until_s=NOW_S - 20)).workloads[0].age_s == 20.0
    assert build().workloads[0].age_s > 1e5


def test_nobody_asking_is_known_to_be_no_demand():
    others = ("mobula_queue_depth", "mobula_request_output_tokens_count")
    quiet = {name: series for name, series in counters(0.0).items() if name in others}
    (workload,) = build(telemetry=quiet).workloads
    assert workload.age_s == 0.0
    assert sum(bucket.requests for bucket in workload.buckets) == 0.0


def test_nonsense_of_a_worker_says_nothing():
    (state,) = build([member("d0")], [load("d0", power_w=math.nan, step_s=math.inf)]).replicas
    assert (state.load.power_w, state.load.step_s, state.load_age_s) == (0.0, 0.0, 0.1)
    (state,) = build([member("d0")], [load("d0", power_w=1e300)]).replicas
    assert state.load.power_w == 0.0


def test_slow_steps_are_believed_bit_by_bit():
    slow = [load("d0", slowdown=2.0)]
    decode = build([member("d0")], slow).groups[0]
    assert decode.slowdown == pytest.approx(1.095, abs=0.001)
    known = {"m/decode/p": GroupMemory(wanted=2, slowdown=decode.slowdown)}
    later = [
        build([member("d0")], slow, memory=Memory(groups=known, now_s=NOW_S - gap_s)).groups[0].slowdown
        for gap_s in (0.5, 1.0, 3.0)
    ]
    assert later == pytest.approx([1.139, 1.181, 1.330], abs=0.001)
    assert build([member("d0")], [load("d0", slowdown=math.nan)]).groups[0].slowdown == 1.0


def test_replica_that_has_not_measured_itself_is_not_believed_to_be_infinitely_fast():
    unmeasured = msgspec.structs.replace(member("d0"), performance=PerformanceModel(step_s=0.0, prefill_token_s=0.0))
    (decode, _) = build([unmeasured], [load("d0", slowdown=2.0)]).groups
    assert (decode.performance, decode.slowdown) == (None, 1.0)
    assert build([unmeasured, member("d1")]).groups[0].performance == H100_8B


def test_nodes_are_the_configs_and_the_dead_are_told():
    one, other = build(alive=("b",)).nodes
    assert (one.zone, one.market, one.price_usd_per_hour, one.alive, other.alive) == ("z", Market.SPOT, 3.0, False, True)


def test_a_schedule_holds_by_the_clock_on_the_wall():
    office = Schedule(start="08:00", end="18:00", min_replicas=3)
    fleet = msgspec.structs.replace(FLEET, replicas=(msgspec.structs.replace(FLEET.replicas[0], schedules=(office,)),))
    eight_s = 1_800_000_000.0 // 86400 * 86400 + 8 * 3600

    def least(now_s: float, ahead_s: float = 0.0) -> int:
        return assemble(fleet, Seen(), {}, Memory(), now_s, ahead_s).groups[0].min_replicas

    assert [least(eight_s - 1), least(eight_s), least(eight_s - 60, 60.0)] == [2, 3, 3]
