"""Money and energy of unlike machines, and of a fleet with several models."""

from __future__ import annotations

import msgspec
import pytest

from cluster.errors import InvalidConfig
from cluster.fleet import ModelSpec, NodeSpec
from cluster.record import TraceRow
from cluster.replica import Role
from simulator.simulation import Setup, Simulation
from tests.simulator.small import PACE, fleet, group


def test_each_machine_idles_at_its_own_watts():
    unlike = fleet(
        groups=(
            group(Role.DECODE, pool="h100", count=1),
            group(Role.DECODE, pool="l4", count=2, pace=msgspec.structs.replace(PACE, accelerator="l4"), kv_blocks=500),
        ),
        nodes=(
            NodeSpec(name="a", pool="h100", accelerator="h100", slots=1, price_usd_per_hour=6.0),
            NodeSpec(name="b", pool="l4", accelerator="l4", slots=2, price_usd_per_hour=1.0),
        ),
    )
    busy = [TraceRow(arrival_s=1.0 + 0.1 * i, prompt_tokens=500, output_tokens=100) for i in range(100)]
    simulation = Simulation(Setup(fleet=unlike, warm_up_s=0.0, control=False), iter(busy))
    result = simulation.run()
    work = {host: simulation.engines.work(host.engine, simulation.timeline.now_s) for host in simulation.hosts.values()}
    expected_j = sum(one.energy_j + host.idle_w * (result.span_s - one.busy_s) for host, one in work.items())
    assert {host.idle_w for host in work} == {8.0, 70.0}
    assert result.kwh == pytest.approx(expected_j / 3.6e6, rel=1e-6)


def test_a_workload_says_which_of_several_models_it_asks_for():
    models = (ModelSpec(name="m", path="m"), ModelSpec(name="other", path="o"))
    groups = (group(Role.MIXED, model="m"), group(Role.MIXED, model="other"))
    rows = [TraceRow(arrival_s=1.0, prompt_tokens=50, output_tokens=5)]
    with pytest.raises(InvalidConfig, match=r"this fleet serves m, other: say which"):
        Simulation(Setup(fleet=fleet(groups=groups, models=models)), iter(rows))
    with pytest.raises(InvalidConfig, match=r"model 'third' is none of this fleet's: m, other"):
        Simulation(Setup(fleet=fleet(groups=groups, models=models), model="third"), iter(rows))
    simulation = Simulation(Setup(fleet=fleet(groups=groups, models=models), model="other", warm_up_s=0.0), iter(rows))
    assert simulation.run().completed == 1
    assert sum(gateway.counters["other"].arrivals for gateway in simulation.gateways) == 1
