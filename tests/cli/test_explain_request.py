"""Why a request went where it did, from the gateway's log."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from cli.fleet_home import FleetHome
from cli.main import main
from cluster.fleet import Fleet, GatewaySpec, ModelSpec, ReplicaGroup
from cluster.record import CandidateRecord, RequestRecord, RouteRecord, to_line
from cluster.replica import Role
from tests.cli.fake_answerer import FakeAnswerer


def candidate(replica_id: str, queue_s: float, **terms: float) -> CandidateRecord:
    known = {"queue_s": queue_s, "ttft_s": queue_s + 0.03, "tpot_s": 0.0131, "transfer_s": 0.0, "held_back": 0.0}
    return CandidateRecord(replica_id=replica_id, terms={**known, **terms}, score=2.6 + queue_s)


ROUTE = RouteRecord(
    decode=candidate("decode-0", 0.004),
    decode_runner_up=candidate("decode-1", 0.09),
    prefill_runner_up=candidate("prefill-0", 0.5),
    reason="17 uncached tokens are cheaper here",
    predicted_ttft_s=0.034,
    predicted_tpot_s=0.0131,
)


def record(request_id: str, **more: object) -> RequestRecord:
    fields = {
        "arrival_s": 1.0,
        "prompt_tokens": 812,
        "output_tokens": 200,
        "request_id": request_id,
        "http_request_id": "http-1",
        "arrival_unix_s": 1e9,
        "model": "tiny",
        "outcome": "completed",
        "replicas": ("decode-0",),
        "route": ROUTE,
        "ttft_s": 0.036,
        "e2e_s": 2.74,
    }
    return RequestRecord(**{**fields, **more})


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a fleet's request log; the fleet is down."""
    monkeypatch.setenv("MOBULA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "90")
    (tmp_path / "log").mkdir()
    configure(tmp_path / "log")
    return tmp_path / "log"


def configure(log: Path | None) -> Fleet:
    home = FleetHome("demo")
    home.make()
    home.journal_path.touch()
    fleet = Fleet(
        name="demo",
        models=(ModelSpec(name="tiny", path="/m"),),
        replicas=(ReplicaGroup(role=Role.MIXED),),
        gateway=GatewaySpec(request_log=None if log is None else str(log)),
    )
    home.config_path.write_bytes(msgspec.json.encode(fleet))
    return fleet


def write(path: Path, *records: RequestRecord, age_s: float = 0.0) -> None:
    path.write_bytes(b"".join(map(to_line, records)))
    os.utime(path, (1e9 - age_s, 1e9 - age_s))


def run(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(["explain", "--request", *words])
    return ended.value.code


def told(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert run(*words) == 0
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out)) <= 90
    return [" ".join(line.split()) for line in out]


def test_winner_and_runner_up_stand_side_by_side_with_their_terms(log: Path, capsys):
    write(log / "requests-a.jsonl", record("other"), record("r-1"))
    lines = told(capsys, "r-1")
    assert lines[0].startswith("Request r-1 completed: tiny, 812 prompt tokens, 200 output tokens")
    assert "TTFT 36.0 ms, e2e 2.74 s" in lines
    assert "17 uncached tokens are cheaper here; attempt 1, tried decode-0" in lines
    assert "predicted TTFT 34.0 ms, TPOT 13.1 ms" in lines
    assert "decode on decode-0; decode-1 would have won with 86.0 ms less" in lines
    assert "queue 4.0 ms 90.0 ms" in lines
    assert not any(line.startswith(("transfer", "held back")) for line in lines)
    assert any(line.startswith("prefilled elsewhere it would have been on prefill-0: queue 500.0 ms") for line in lines)


def test_newest_file_with_the_request_answers(log: Path, capsys):
    write(log / "requests-a.jsonl.1", record("r-1", model="old"), age_s=60)
    write(log / "requests-b.jsonl", record("r-2"))
    assert "old" in told(capsys, "r-1")[0]


def test_all_choices_of_an_http_request_are_told(log: Path, capsys):
    write(log / "requests-a.jsonl", record("r-1"), record("r-2"))
    assert [line.split()[1] for line in told(capsys, "http-1") if line.startswith("Request ")] == ["r-1", "r-2"]


def test_id_of_an_answer_finds_all_its_choices(log: Path, capsys):
    write(log / "requests-a.jsonl", record("cmpl-4f-0"), record("cmpl-4f-1"), record("cmpl-4f0-0"))
    assert [line.split()[1] for line in told(capsys, "cmpl-4f") if line.startswith("Request ")] == ["cmpl-4f-0", "cmpl-4f-1"]


def test_request_that_was_never_routed_says_why(log: Path, capsys):
    write(log / "requests-a.jsonl", record("r-1", route=None, outcome="rejected", error="queue is full", replicas=(), attempts=0))
    lines = told(capsys, "r-1")
    assert "error: queue is full" in lines
    assert lines[-1] == "It never had a route: it waited for a replica with room."


@pytest.mark.parametrize(
    ("runner_up", "said"),
    [
        (None, "there was no runner-up"),
        (candidate("decode-1", 0.004), "decode-1 was as good"),
        (candidate("decode-1", 0.0, held_back=1.0), "decode-1 has the better score and was put behind, see its terms"),
    ],
)
def test_margin_is_said_in_words(log: Path, capsys, runner_up: CandidateRecord | None, said: str):
    route = msgspec.structs.replace(ROUTE, decode_runner_up=runner_up)
    write(log / "requests-a.jsonl", record("r-1", route=route))
    assert f"decode on decode-0; {said}" in told(capsys, "r-1")


def test_line_that_a_crash_cut_short_is_passed_over(log: Path, capsys):
    (log / "requests-a.jsonl").write_bytes(
        to_line(record("r-1"))[:80] + b"\n" + b'{"request_id":"r-1", \n' + to_line(record("r-1"))
    )
    assert told(capsys, "r-1")[0].startswith("Request r-1 completed")


def test_json_is_the_records(log: Path, capsys):
    write(log / "requests-a.jsonl", record("r-1"))
    assert run("r-1", "--json") == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=list[RequestRecord]) == [record("r-1")]


@pytest.mark.parametrize(
    ("configured", "said"), [(True, "request r-9 is not in the request log"), (False, "writes no request log")]
)
def test_what_is_not_there_is_said(log: Path, capsys, configured: bool, said: str):
    configure(log if configured else None)
    assert run("r-9") == 2
    assert said in capsys.readouterr().err


def test_running_fleet_is_asked_where_its_log_is(log: Path, capsys):
    write(log / "requests-a.jsonl", record("r-1"))
    fleet = configure(log)
    FleetHome("demo").config_path.unlink()
    with FakeAnswerer("demo", {"fleet": lambda _: fleet}):
        assert told(capsys, "r-1")[0].startswith("Request r-1 ")
