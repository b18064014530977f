"""A recorded request log goes through the simulator whole: as many requests, each with its own lengths, with a node lost or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.demo_simulated import counted, read_log
from benchmarks.simulated_replay import replay
from cluster.errors import InvalidTrace
from cluster.fleet import Fleet, ModelSpec, NodeSpec, Pace, ReplicaGroup
from cluster.record import RequestRecord, to_line
from cluster.replica import Role
from cluster.slo import Slo
from simulator.world import Fault, World

OPENED_UNIX_S = 1_800_000_000.0
FLEET = Fleet(
    models=(ModelSpec(name="m", path="m"),),
    nodes=tuple(NodeSpec(name=name, accelerator="l4", slots=2) for name in ("a", "b")),
    replicas=(
        ReplicaGroup(role=Role.MIXED, count=4, kv_blocks=256, pace=Pace(shape="llama-3.1-8b", accelerator="l4", speedup=4.0)),
    ),
    slo={"default": Slo(ttft_s=2.0, tpot_s=0.2)},
)


def record(number: int, **more: object) -> RequestRecord:
    """One of a request every 0.1 s, of which each takes 1 s: logged as they end, so not in order of arrival."""
    arrival_s = 3.0 + 0.1 * number
    facts = {
        "arrival_s": arrival_s,
        "arrival_unix_s": OPENED_UNIX_S + arrival_s,
        "prompt_tokens": 20 + number,
        "output_tokens": 5 + number % 3,
        "request_id": f"r{number}",
        "model": "m",
        "outcome": "completed",
        "ttft_s": 0.5,
        "tpot_s": 0.1,
        "e2e_s": 0.9,
    }
    return RequestRecord(**(facts | more))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "requests-a.jsonl"
    records = [record(number) for number in range(100)]
    records[10], records[12] = records[12], records[10]
    path.write_bytes(b"".join(map(to_line, records)))
    return path


def test_times_of_a_log_count_from_when_its_traffic_began(log: Path):
    found = read_log(log, first_s=1.0)
    assert found.lead_s == pytest.approx(2.0)
    assert found.began_unix_s == pytest.approx(OPENED_UNIX_S + 2.0)
    assert found.timings[0].arrival_s == pytest.approx(1.0)
    assert [one.arrival_s for one in found.timings] == sorted(one.arrival_s for one in found.timings)


def test_a_request_that_failed_live_counts_as_failed(tmp_path: Path):
    path = tmp_path / "requests-b.jsonl"
    path.write_bytes(to_line(record(0)) + to_line(record(1, outcome="failed", error="no replica", ttft_s=None)))
    assert counted(read_log(path).timings, Slo(ttft_s=0.6)) == {"completed": 1, "in_slo": 1}


def test_an_empty_log_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "requests-c.jsonl"
    path.write_bytes(b"")
    with pytest.raises(InvalidTrace, match=r"requests-c\.jsonl"):
        read_log(path)


@pytest.mark.parametrize("faults", [(), (Fault(at_s=7.0, kind="lose_node", target="b"),)], ids=["all well", "a node lost"])
def test_a_log_replayed_has_every_request_once_and_whole(log: Path, faults: tuple[Fault, ...]):
    rows = read_log(log).rows
    found = replay(FLEET, rows, World(step_times="believed", faults=faults))
    assert found.result.completed == len(rows) == 100
    asked = sorted((row.arrival_s, row.output_tokens) for row in rows)
    assert sorted((one.arrival_s, one.output_tokens) for one in found.timings) == asked
    assert found.result.output_tokens == sum(row.output_tokens for row in rows)
    assert bool(found.result.retries) == bool(faults)
