"""The request log keeps to its bounds and goes on after trouble."""

from __future__ import annotations

import os
import threading

import msgspec
import pytest

from cluster.errors import InvalidConfig
from cluster.record import RequestRecord
from cluster.request import Request, SamplingParams
from gateway import request_log
from gateway.generation import Generation
from gateway.request_log import RequestLog


def ended(number: int = 0, **more) -> Generation:
    request = Request(
        request_id=str(number), model="m", prompt=(1, 2), sampling=SamplingParams(max_tokens=1), arrival_s=1.0, **more
    )
    return Generation(request, None, lambda: None)


def records(path) -> list[str]:
    return [msgspec.json.decode(line, type=RequestRecord).request_id for line in path.read_bytes().splitlines()]


def test_a_file_at_its_bound_is_rotated_and_the_oldest_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(request_log, "FILES", 3)
    log = RequestLog(str(tmp_path), "g", 0.0, dropped=pytest.fail, file_bytes=1)
    for number in range(5):
        log.write(ended(number), "completed")
    log.close()
    names = [path.name for path in sorted(tmp_path.glob("requests-*"))]
    assert names == ["requests-g.jsonl", "requests-g.jsonl.1", "requests-g.jsonl.2"]
    assert [records(tmp_path / name) for name in names] == [[], ["4"], ["3"]]


def test_a_requests_priority_is_written(tmp_path):
    log = RequestLog(str(tmp_path), "g", 0.0, dropped=pytest.fail)
    log.write(ended(priority=3), "completed")
    log.close()
    assert msgspec.json.decode((tmp_path / "requests-g.jsonl").read_bytes(), type=RequestRecord).priority == 3


def test_what_past_starts_left_is_bounded_oldest_first(tmp_path, monkeypatch):
    monkeypatch.setattr(request_log, "DIRECTORY_FILES", 3)
    for age in range(5):
        path = tmp_path / f"requests-{age}.jsonl"
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    RequestLog(str(tmp_path), "g", 0.0, dropped=pytest.fail).close()
    assert sorted(path.name for path in tmp_path.glob("requests-*")) == ["requests-0.jsonl", "requests-1.jsonl", "requests-g.jsonl"]


def test_a_record_that_cannot_be_written_is_counted_and_the_next_is_written(tmp_path):
    lost = []
    log = RequestLog(str(tmp_path), "g", 0.0, dropped=lambda: lost.append(threading.current_thread().name))
    log.write(ended(0, tenant=object()), "completed")
    log.write(ended(1), "completed")
    log.close()
    assert lost == ["request-log"]
    assert records(tmp_path / "requests-g.jsonl") == ["1"]


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidConfig, match=r"gateway\.request_log .*file"):
        RequestLog(str(tmp_path / "file"), "g", 0.0, dropped=pytest.fail)


def test_beyond_its_queue_records_are_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(request_log, "QUEUE_RECORDS", 0)
    lost = []
    log = RequestLog(str(tmp_path), "g", 0.0, dropped=lambda: lost.append(1))
    log.write(ended(), "completed")
    log.close()
    assert lost == [1]
