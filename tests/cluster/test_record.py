"""A request log explains itself, and can be replayed as it is."""

import json

import msgspec
import pytest

from cluster.record import SCHEMA, CandidateRecord, RequestRecord, RouteRecord, TraceRow, to_line

ROW = {
    "arrival_s": 1.5,
    "prompt_tokens": 40,
    "output_tokens": 7,
    "block_hashes": (2**64 - 1, 0),
    "tenant": "red",
    "session_id": "s",
}
RECORD = RequestRecord(
    **ROW,
    request_id="r",
    arrival_unix_s=1.7e9,
    model="tiny",
    outcome="completed",
    route=RouteRecord(
        decode=CandidateRecord(replica_id="d0", terms={"queue_s": 0.1}, score=0.1), predicted_ttft_s=0.2, predicted_tpot_s=0.01
    ),
    ttft_s=0.21,
)


def test_a_record_survives_its_line():
    assert msgspec.json.decode(to_line(RECORD), type=RequestRecord) == RECORD


def test_a_request_log_line_is_a_trace_line():
    assert msgspec.json.decode(to_line(RECORD), type=TraceRow) == TraceRow(**ROW)


def test_every_line_is_one_line_and_names_its_schema():
    assert to_line(RECORD).count(b"\n") == 1
    assert json.loads(to_line(RECORD))["schema"] == SCHEMA


def test_another_schema_is_refused():
    with pytest.raises(msgspec.ValidationError, match="schema"):
        msgspec.json.decode(to_line(RECORD).replace(b'"schema":1', b'"schema":2'), type=TraceRow)
