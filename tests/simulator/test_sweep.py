"""A sweep file says what is varied, and what it says wrongly is refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.errors import InvalidConfig
from simulator.case import run
from simulator.sweep import load_sweep, summarise
from tests.simulator.comparing import CLUSTER, SHORT, outcome

pytestmark = pytest.mark.timeout(900)  # Who simulates first waits for the compiler, which takes a minute and more.


@pytest.fixture
def written(tmp_path: Path):
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    (tmp_path / "other.yaml").write_text(CLUSTER.replace("slots: 2", "slots: 4"))

    def write(**changes) -> Path:
        plain = {"workload": {"trace": SHORT}, "fleet": "cluster.yaml", "seeds": 2, "warm_up_s": 0, **changes}
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(plain))
        return tmp_path / "sweep.yaml"

    return write


def test_file_without_variants_is_one_variant_over_its_seeds(written):
    assert [case.seed for case in load_sweep(written())["base"]] == [0, 1]


def test_dotted_paths_change_fleet_world_workload_and_run(written):
    changes = {"fleet.replicas[1].count": 3, "world.hop_s": 0.25, "workload.rate": 2.0, "run.control": False}
    cases = load_sweep(written(variants={"as is": {}, "other": changes}))
    (before, _), (after, _) = cases["as is"], cases["other"]
    assert (before.fleet.replicas[1].count, after.fleet.replicas[1].count) == (1, 3)
    assert (after.world.hop_s, after.traffic.rate, after.control) == (0.25, 2.0, False)
    assert (before.world.hop_s, before.traffic.rate, before.control) != (0.25, 2.0, False)


def test_variant_may_be_another_file_and_settings_in_it(written):
    changes = {"fleet.nodes[0].price_usd_per_hour": 1.0, "fleet": "other.yaml"}
    fleet = load_sweep(written(variants={"other": changes}))["other"][0].fleet
    assert (fleet.nodes[0].slots, fleet.nodes[0].price_usd_per_hour) == (4, 1.0)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("fleet.replicas[7].count", 1, r"variants\.v: fleet\.replicas\[7\]\.count: \[7\] is outside a list of 2"),
        ("fleet.replica[0].count", 1, r"there is no 'replica'; did you mean replicas"),
        ("fleet.replicas[0].cont", 1, r"fleet: unknown key `replicas\[0\]\.cont`; did you mean count"),
        ("fleet.replicas[0].count", 99, r"count 99 is outside \[0, 2\]"),
        ("world.hop_s", -1, r"world: hop_s -1: Expected `float` >= 0"),
        ("workload.rate", 0, r"workload: rate 0: Expected `float` > 0"),
        ("flet.name", "x", r"flet\.name: there is no 'flet'; did you mean fleet"),
        ("fleet", 3, r"fleet 3 is no path of a file"),
        ("fleet..name", "x", r"'fleet\.\.name' is no path"),
        ("run", 3, r"run"),
    ],
)
def test_wrong_change_is_refused_with_its_place(written, path, value, said):
    with pytest.raises(InvalidConfig, match=said):
        load_sweep(written(variants={"v": {path: value}}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": 0}, r"sweep\.yaml: seeds 0: Expected `int` >= 1"),
        ({"sedes": 3}, r"unknown key `sedes`; did you mean seeds"),
        ({"variants": {}}, r"variants is empty"),
        ({"seeds": 200_000}, r"200000 runs are above 100000"),
        ({"fleet": "gone.yaml"}, r"gone\.yaml: cannot be read"),
    ],
)
def test_wrong_file_is_refused_with_its_place(written, changes, said):
    with pytest.raises(InvalidConfig, match=said):
        load_sweep(written(**changes))


def test_summary_leaves_out_what_some_run_does_not_have():
    found = summarise("v", [outcome(attainment=0.9), outcome(attainment=1.0, ttft_p90_s=None)])
    assert found.metrics["attainment"].mean == pytest.approx(0.95)
    assert "ttft_p90_s" not in found.metrics


def test_run_is_the_same_when_it_is_run_again(written):
    case = load_sweep(written())["base"][1]
    first, second = run(case), run(case)
    assert first.arrived > 0
    assert (first.attainment, first.ttft_p90_s, first.kwh) == (second.attainment, second.ttft_p90_s, second.kwh)
