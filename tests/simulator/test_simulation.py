"""Whole simulations: nothing lost whatever breaks, the same bytes for the same seed, and a gateway that chooses as the live one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidConfig, InvalidTrace
from cluster.fleet import Fleet, GatewaySpec
from cluster.record import TraceRow
from cluster.replica import Role
from cluster.slo import Slo
from cluster.snapshot import ClusterSnapshot
from simulator.flight import Flight
from simulator.result import Result
from simulator.simulation import Setup, Simulation
from simulator.world import Fault, World
from tests.simulator.small import APART, PACE, TOGETHER, fleet, group, traffic

FAULTS = ("kill", "hang", "slow", "lose_node", "take_spot", "lose_telemetry")


class Counted:
    """A simulation, and what became of each request."""

    def __init__(self, fleet: Fleet, rows: Iterator[TraceRow], world: World | None = None, **setup: object) -> None:
        self.ended: list[Flight] = []
        world = World() if world is None else world
        self.simulation = Simulation(
            Setup(fleet=fleet, world=world, warm_up_s=0.0, **setup), rows, ended=lambda flight, now_s: self.ended.append(flight)
        )

    def run(self) -> Result:
        return self.simulation.run()


@st.composite
def worlds(draw: st.DrawFn) -> World:
    faults = [
        Fault(
            at_s=draw(st.floats(0.5, 25.0)),
            kind=draw(st.sampled_from(FAULTS)),
            lasts_s=draw(st.sampled_from((None, 3.0))),
            notice_s=2.0,
        )
        for _ in range(draw(st.integers(0, 4)))
    ]
    return World(
        faults=tuple(faults),
        report_loss_share=draw(st.sampled_from((0.0, 0.3))),
        start_failure_share=draw(st.sampled_from((0.0, 0.3))),
        replica_mtbf_s=draw(st.sampled_from((None, 40.0))),
        spot_mtbf_s=draw(st.sampled_from((None, 20.0))),
        spot_notice_s=1.0,
        spot_gone_s=5.0,
        link_bytes_per_s=draw(st.sampled_from((1e8, 3e9))),
    )


@settings(max_examples=25)
@given(groups=st.sampled_from((APART, TOGETHER)), world=worlds(), rate_rps=st.sampled_from((5.0, 25.0)), seed=st.integers(0, 99))
def test_every_request_ends_once_whatever_breaks(groups, world, rate_rps, seed):
    counted = Counted(fleet(groups), traffic(200, rate_rps, seed), world, seed=seed)
    result = counted.run()
    names = [flight.request_id for flight in counted.ended]
    assert len(names) == len(set(names))
    assert len(names) + sum(result.rejected.values()) == result.arrived == 200
    engines, hosts = counted.simulation.engines.state, counted.simulation.hosts.values()
    for host in hosts:
        assert not host.busy
        if host.alive:
            assert engines.engines["used"][host.engine] == 0
    assert all(gateway.view.in_flight == 0 and gateway.waiting == 0 for gateway in counted.simulation.gateways)
    assert all(each.in_flight == 0 for gateway in counted.simulation.gateways for each in gateway.counters.values())


@pytest.mark.parametrize("groups", [APART, TOGETHER])
def test_the_same_seed_makes_the_same_bytes_and_another_seed_others(groups):
    world = World(faults=(Fault(at_s=5.0, kind="kill"), Fault(at_s=9.0, kind="lose_node", lasts_s=5.0)), replica_mtbf_s=60.0)

    def encoded(seed: int) -> bytes:
        result = Counted(fleet(groups), traffic(300, 15.0), world, seed=seed).run()
        return msgspec.json.encode(msgspec.structs.replace(result, cpu_s=0.0, requests_per_cpu_s=0.0, peak_rss_mb=0.0))

    assert encoded(1) == encoded(1)
    assert encoded(1) != encoded(2)


@pytest.mark.parametrize("groups", [APART, TOGETHER])
def test_spans_and_single_steps_give_the_same_result(groups):
    spans, steps = (
        Counted(fleet(groups), traffic(300, 20.0), World(), stepwise=stepwise, control=False).run() for stepwise in (False, True)
    )
    assert (spans.completed, spans.kept, spans.acts, spans.transfers) == (steps.completed, steps.kept, steps.acts, steps.transfers)
    for name, one in spans.classes.items():
        assert one == steps.classes[name]


def test_tokens_out_are_the_tokens_asked_for():
    rows = list(traffic(300, 20.0))
    result = Counted(fleet(), iter(rows)).run()
    assert result.output_tokens == sum(max(1, row.output_tokens) for row in rows)
    assert result.prompt_tokens == sum(row.prompt_tokens for row in rows)


def test_an_idle_fleet_draws_idle_watts_and_costs_its_nodes():
    rows = iter([TraceRow(arrival_s=3600.0, prompt_tokens=1, output_tokens=1)])
    counted = Counted(fleet(), rows, control=False)
    result = counted.run()
    idle_w = sum(host.idle_w for host in counted.simulation.hosts.values())
    assert result.kwh == pytest.approx(idle_w * 3600.0 / 3.6e6, rel=1e-3)
    assert result.usd == pytest.approx(12.0, rel=1e-3)
    assert result.utilisation < 1e-4


def test_a_burst_is_answered_with_replicas_and_they_go_again():
    rows = itertools.chain(traffic(200, 2.0, 1), ())
    busy = [msgspec.structs.replace(row, arrival_s=100.0 + row.arrival_s) for row in traffic(6000, 60.0, 2)]
    after = [msgspec.structs.replace(row, arrival_s=210.0 + row.arrival_s) for row in traffic(600, 1.0, 3)]
    ordered = sorted([*rows, *busy, *after], key=lambda row: row.arrival_s)
    result = Counted(fleet(), iter(ordered)).run()
    replicas = result.course.replicas["mixed ready"]
    assert max(replicas[100:220]) > replicas[50]
    assert replicas[-1] < max(replicas)
    assert any("to " in act.action and act.reason for act in result.acts)


def test_what_a_controller_observes_is_the_snapshot_of_live_telemetry():
    counted = Counted(fleet(APART), traffic(100, 10.0))
    counted.run()
    simulation = counted.simulation
    assert simulation.control is not None
    snapshot = simulation.cluster.observe(simulation.control.memory)
    assert isinstance(snapshot, ClusterSnapshot)
    again = msgspec.json.decode(msgspec.json.encode(snapshot), type=ClusterSnapshot)
    assert again == snapshot
    assert {state.role for state in snapshot.replicas} == {Role.PREFILL, Role.DECODE}
    assert snapshot.workloads[0].buckets


def test_an_interrupted_run_keeps_what_it_found():
    def rows() -> Iterator[TraceRow]:
        yield from traffic(100, 20.0)
        raise KeyboardInterrupt

    result = Counted(fleet(), rows()).run()
    assert result.interrupted
    assert 0 < result.completed <= result.arrived == 99


def test_a_trace_that_is_not_sorted_is_refused():
    rows = [TraceRow(arrival_s=at_s, prompt_tokens=9, output_tokens=9) for at_s in (1.0, 3.0, 2.0)]
    with pytest.raises(InvalidTrace, match=r"a request at 2\.0 s comes after one at 3\.0 s"):
        Counted(fleet(), iter(rows)).run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": (group(Role.MIXED, kv_blocks=60_000),)}, r"replicas\[0\]\.kv_blocks 60000.*at most \d+ fit"),
        ({"groups": (group(Role.MIXED, pace=msgspec.structs.replace(PACE, shape="llama-3.1-70b")),)}, r"weights of llama-3\.1-70b"),
        ({"groups": (group(Role.MIXED, pace=None, engine="torch"),)}, r"no pace.*mobula calibrate"),
        ({"slo": {"default": Slo(tpot_s=0.001)}}, r"slo\.default\.tpot_s 0\.001 is below 0\.00\d+"),
        ({"slo": {"fast": Slo(ttft_s=1e-4)}}, r"slo\.fast\.ttft_s 0\.0001 is below"),
    ],
)
def test_what_cannot_be_is_refused_before_it_begins(changes, message):
    with pytest.raises(InvalidConfig, match=message):
        Counted(fleet(**changes), traffic(10, 1.0))


def test_a_prompt_that_no_replica_holds_is_rejected_as_live():
    rows = [
        TraceRow(arrival_s=1.0, prompt_tokens=40_000, output_tokens=5),
        TraceRow(arrival_s=1.1, prompt_tokens=10, output_tokens=5),
    ]
    result = Counted(fleet(), iter(rows)).run()
    assert dict(result.rejected) == {"longer than any replica holds": 1}
    assert result.completed == 1


def test_without_delay_loss_or_chance_latency_is_the_models_own():
    rows = [TraceRow(arrival_s=10.0 * i + 1.0, prompt_tokens=512, output_tokens=21) for i in range(5)]
    counted = Counted(fleet(gateway=GatewaySpec(allow_anonymous=True)), iter(rows), World.ideal(), control=False)
    counted.run()
    (model,) = {id(one): one.believed for one in counted.simulation._machines.values()}.values()
    for flight, row in zip(counted.ended, rows, strict=True):
        assert flight.first_s == pytest.approx(row.arrival_s + model.prefill_s(512), rel=1e-9)


def test_hashes_of_a_trace_are_found_again_in_caches():
    shared, alone = (Counted(fleet(), traffic(400, 10.0, shared=shared), control=False).run() for shared in (True, False))
    assert shared.cached_share > 0.1
    assert alone.cached_share == 0.0


def test_rates_of_faults_are_independent_streams():
    calm = Counted(fleet(), traffic(100, 10.0), World(start_failure_share=0.0)).run()
    other = Counted(fleet(), traffic(100, 10.0), World(start_failure_share=0.9)).run()
    assert calm.classes == other.classes


@pytest.mark.parametrize("groups", [APART, TOGETHER])
def test_a_gateway_knows_all_blocks_of_prompts_that_engines_keep(groups):
    counted = Counted(fleet(groups), traffic(300, 15.0), World.ideal(), control=False)
    counted.run()
    simulation = counted.simulation
    simulation.serving.deliver(float("inf"))
    state = simulation.engines.state
    prompts = {block for flight in counted.ended for block in flight.hashes}
    entries = state.entries[np.isin(state.entries["engine"], [host.engine for host in simulation.hosts.values()])]
    for gateway in simulation.gateways:
        view = gateway.view.routing_view("m", simulation.timeline.now_s)
        for host in simulation.hosts.values():
            kept = set(entries["hash"][entries["engine"] == host.engine].tolist()) & prompts
            known = view.index._held.get(view.row_of[host.replica_id], set())
            assert known == kept
            assert any(block >= 2**63 for block in known) or not known


def test_nobody_is_sent_on_before_the_place_was_free():
    small = group(Role.MIXED, count=1, max_running=4)
    counted = Counted(fleet((small,)), traffic(60, 30.0), control=False)
    sent: list[tuple[float, float]] = []
    serving, timeline = counted.simulation.serving, counted.simulation.timeline
    send, heard = serving.send, serving._heard

    def noting(flight, route) -> None:
        sent.append((timeline.now_s, noting.at_s))
        send(flight, route)

    def hearing(news) -> None:
        noting.at_s = news.at_s
        heard(news)

    noting.at_s = 0.0
    serving._heard = hearing
    for gateway in counted.simulation.gateways:
        gateway._send_to = noting
    counted.run()
    assert len(sent) == 60
    assert all(now_s >= at_s for now_s, at_s in sent)


def test_the_warm_up_costs_nothing():
    rows = [TraceRow(arrival_s=1.0 * i, prompt_tokens=100, output_tokens=20) for i in range(200)]
    (whole, part) = (
        Simulation(Setup(fleet=fleet(), warm_up_s=warm_up_s, control=False), iter(rows)).run() for warm_up_s in (0.0, 100.0)
    )
    assert part.usd == pytest.approx(whole.usd / 2, rel=0.02)
    assert part.replica_hours == pytest.approx(whole.replica_hours / 2, rel=0.02)
    assert part.kwh == pytest.approx(whole.kwh / 2, rel=0.05)
    assert part.goodput_rps == pytest.approx(1.0, rel=0.02)
