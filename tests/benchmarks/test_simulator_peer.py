"""The peer's arm: what the peer is asked, what is read from its answer, and what is said where it is absent."""

import json
from pathlib import Path

import pytest

from benchmarks import simulator_peer
from benchmarks.simulator_peer import ARMS, MEMORY_ARM, NOT_INSTALLED, Arm, figures, measured

STAND_IN = """
import json, os, pathlib, types
HERE = pathlib.Path(__file__).parent
def run_mocker_synthetic_trace_replay(input_tokens, output_tokens, request_count, **options):
    asked = {"input_tokens": input_tokens, "output_tokens": output_tokens, "requests": request_count, "log": os.environ["DYN_LOG"]}
    with (HERE / "asked.jsonl").open("a") as out:
        print(json.dumps(asked | options), file=out)
    print("a line of the peer's own")
    sum(range(2_000_000))
    return types.SimpleNamespace(summary={
        "completed_requests": request_count - int(os.environ.get("LOST", "0")), "mean_ttft_ms": 41.0, "mean_tpot_ms": 6.5,
        "prefix_cache_reused_ratio": 0.25,
    })
"""
ARM = Arm(replicas=10, requests=500, router="kv", shared_prefix=0.5, prefixes=3)


@pytest.fixture
def no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_peer, "PACKAGE", "no-such-package-anywhere")


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the peer's name that writes down what it is asked; the folder it lies in."""
    (tmp_path / "dynamo").mkdir()
    (tmp_path / "dynamo" / "_core.py").write_text(STAND_IN)
    (tmp_path / "ai_dynamo_runtime-9.9.9.dist-info").mkdir()
    (tmp_path / "ai_dynamo_runtime-9.9.9.dist-info" / "METADATA").write_text("Name: ai-dynamo-runtime\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(simulator_peer.__file__).parents[1]}")
    return tmp_path / "dynamo"


def asked_of(stand_in: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (stand_in / "asked.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("no_peer")
def test_an_absent_peer_has_no_version_and_no_measurement():
    assert simulator_peer.version() is None
    assert measured(ARM) is None


@pytest.mark.usefixtures("no_peer")
def test_figures_of_an_absent_peer_are_none_and_say_how_to_install_it(capsys: pytest.CaptureFixture[str]):
    assert figures() is None
    assert capsys.readouterr().err == NOT_INSTALLED + "\n"


def test_the_peer_is_asked_for_the_arm_in_another_process(stand_in: Path):
    measured(ARM)
    (asked,) = asked_of(stand_in)
    assert asked["input_tokens"] == 1024
    assert asked["output_tokens"] == 128
    assert asked["requests"] == 500
    assert asked["num_workers"] == 10
    assert asked["request_rate"] == 40.0
    assert asked["router_mode"] == "kv_router"
    assert asked["shared_prefix_ratio"] == 0.5
    assert asked["num_prefix_groups"] == 3


def test_the_peer_is_kept_from_logging_each_request(stand_in: Path):
    measured(ARM)
    assert asked_of(stand_in)[0]["log"] == "error"


def test_nothing_shared_asks_for_no_prefixes(stand_in: Path):
    measured(Arm(replicas=1, requests=10, router="round_robin"))
    (asked,) = asked_of(stand_in)
    assert asked["router_mode"] == "round_robin"
    assert asked["num_prefix_groups"] == 0


@pytest.mark.usefixtures("stand_in")
def test_the_answer_is_read_in_seconds_and_the_rate_is_of_cpu_time():
    found = measured(ARM)
    assert found is not None
    assert (found.completed, found.ttft_s, found.tpot_s, found.cached_share) == (500, 0.041, 0.0065, 0.25)
    assert 0 < found.requests_per_cpu_s < float("inf")
    assert found.peak_rss_mb > 5


def test_every_round_is_run_and_the_best_is_kept(stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    runs = []
    real = simulator_peer._run
    monkeypatch.setattr(simulator_peer, "_run", lambda arm: runs.append(real(arm)) or runs[-1])
    found = measured(ARM, rounds=3)
    assert found is not None
    assert len(asked_of(stand_in)) == 3
    assert found.requests_per_cpu_s == max(run.requests_per_cpu_s for run in runs)


@pytest.mark.usefixtures("stand_in")
def test_a_peer_that_loses_requests_is_not_believed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOST", "1")
    with pytest.raises(RuntimeError, match="completed 499 of 500"):
        measured(ARM)


def test_a_peer_that_fails_is_quoted(stand_in: Path):
    (stand_in / "_core.py").write_text("raise ValueError('no such mode')")
    with pytest.raises(RuntimeError, match="no such mode"):
        measured(ARM)


def test_each_arm_has_a_figure_beside_the_peak_memory(stand_in: Path):
    assert figures(rounds=1).keys() == ARMS.keys() | {"peak_rss_mb_200k"}
    assert [asked["requests"] for asked in asked_of(stand_in)] == [arm.requests for arm in (*ARMS.values(), MEMORY_ARM)]
