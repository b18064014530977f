"""A command line's words become one ordered stream, whose end is known before it comes, and which holds little of it."""

import itertools
import random
import tracemalloc

import pytest

from cluster.errors import InvalidConfig, InvalidTrace
from cluster.record import TraceRow, to_line
from workloads import reorder
from workloads.reshape import Scale
from workloads.stream import open_workload
from workloads.traces import open_trace

GENERATOR = "steps:rates=4x60/8x60,prompt=fixed(100),output=fixed(10)"


def row(arrival_s, **more):
    return TraceRow(arrival_s=arrival_s, prompt_tokens=100, output_tokens=10, **more)


@pytest.fixture
def written(tmp_path):
    def write(rows):
        path = tmp_path / "log.jsonl"
        path.write_bytes(b"".join(map(to_line, rows)))
        return str(path)

    return write


def test_a_log_in_order_of_completion_streams_in_order_of_arrival(written):
    rows = [row(float(at), session_id=str(at)) for at in range(500)]
    late = random.Random(1)
    ended = sorted(rows, key=lambda each: each.arrival_s + late.uniform(0, reorder.REORDER_S))
    assert list(open_workload(written(ended))) == rows != ended


def test_a_log_is_read_no_further_than_its_window_needs(written):
    last = 10 * reorder.REORDER_S
    path = written([row(1.0), row(0.0), row(last), row(2 * last)]) + ""
    with open(path, "ab") as file:
        file.write(b"{broken")
    assert [each.arrival_s for each in open_workload(path, span_s=5.0)] == [0.0, 1.0]


def test_a_row_later_than_the_reordering_holds_is_named(written):
    path = written([row(5.0), row(6.0 + reorder.REORDER_S), row(4.0)])
    with pytest.raises(InvalidTrace, match=r"log.jsonl:3: '4.0': expected arrival_s of at least 5, as rows may come at most 900 s"):
        list(open_workload(path))


def test_the_reordering_holds_a_bounded_number_of_rows(written, monkeypatch):
    monkeypatch.setattr(reorder, "REORDER_ROWS", 4)
    assert len(list(open_workload(written([row(float(at)) for at in (3, 2, 1, 0, 7, 6, 5, 4)])))) == 8
    with pytest.raises(InvalidTrace, match=r":6: '0.0': expected arrival_s of at least 1,"):
        list(open_workload(written([row(float(at)) for at in (5, 4, 3, 2, 1, 0)])))


def test_a_long_trace_takes_no_more_memory_than_its_reordering(written, monkeypatch):
    monkeypatch.setattr(reorder, "REORDER_ROWS", 1000)
    path = written(row(at / 1000, block_hashes=(at, 2 * at)) for at in range(30_000))
    tracemalloc.start()
    count = sum(1 for _ in open_workload(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 30_000
    assert peak < 2 * 2**20


@pytest.mark.parametrize("scale", [Scale(), Scale(rate=2.0)])
def test_a_generators_span_and_number_are_known_before(scale):
    workload = open_workload(GENERATOR, start_s=30.0, span_s=60.0, scale=scale)
    assert workload.span_s == 60.0 / scale.rate
    assert workload.expected_rows == 4 * 30 + 8 * 30
    assert len(list(workload)) == pytest.approx(workload.expected_rows, rel=0.15)


def test_a_files_span_and_number_are_not_known_before(written):
    workload = open_workload(written([row(0.0)]))
    assert (workload.span_s, workload.expected_rows) == (None, None)
    assert open_workload(written([row(0.0)]), span_s=9.0).span_s == 9.0


@pytest.mark.parametrize("text", ["generator", "file"])
def test_progress_rises_from_0_to_1_as_rows_come(written, text):
    workload = open_workload(GENERATOR if text == "generator" else written(row(float(at)) for at in range(3000)))
    assert workload.progress == 0.0
    seen = [workload.progress for _ in workload]
    assert seen == sorted(seen)
    assert seen[0] < 1.0
    assert workload.progress == 1.0


def test_progress_through_a_window_of_a_file_is_by_time(data_dir):
    workload = open_workload(str(data_dir / "azure_llm_2023/AzureLLMInferenceTrace_conv.csv"), span_s=60.0)
    seen = [(each.arrival_s, workload.progress) for each in workload]
    assert [progress for _, progress in seen] == [pytest.approx(at_s / 60.0, abs=0.05) for at_s, _ in seen]


def test_each_iteration_starts_anew():
    workload = open_workload(GENERATOR, seed=3)
    first = list(itertools.islice(workload, 10))
    assert list(workload)[:10] == first


def test_a_workload_says_what_it_is(written):
    path = written([row(0.0)])
    assert open_workload(path).words == f"{path}, whole: as recorded"
    assert open_workload(path, start_s=60.0).words == f"{path}, from minute 1: as recorded"
    assert open_workload(path, span_s=90.0, scale=Scale(rate=2)).words == f"{path}, minutes 0 to 1.5: rate x 2"


def test_an_output_of_no_token_is_asked_for_as_one(written):
    failed = TraceRow(arrival_s=0.0, prompt_tokens=1, output_tokens=0)
    assert [each.output_tokens for each in open_workload(written([row(0.0), failed]))] == [10, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_s": -1.0}, "start_s -1.0 is outside"),
        ({"start_s": float("nan")}, "start_s nan is outside"),
        ({"span_s": float("inf")}, "span_s inf is outside"),
        ({"scale": Scale(prompt=0.0)}, "scale of prompts 0.0 is outside"),
        ({"scale": Scale(output=float("nan"))}, "scale of outputs nan is outside"),
        ({"scale": Scale(rate=-1.0)}, "scale of the rate -1.0 is outside"),
        ({"scale": Scale(prompt=1e5)}, "prompt_tokens 100 is scaled to 10000000, above 1.04858e\\+06"),
        ({"scale": Scale(rate=1e-12)}, "arrival_s .* is scaled to .*, above 1e\\+09"),
        ({"start_s": 120.0}, "no request arrives in the chosen minutes"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(InvalidConfig, match=message):
        list(open_workload(GENERATOR, **arguments))


def test_a_file_that_went_away_is_an_invalid_trace(written, tmp_path):
    workload = open_workload(written([row(0.0)]))
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(InvalidTrace, match="No such file"):
        list(workload)


@pytest.mark.parametrize(
    ("file", "count"),
    [("azure_llm_2023/AzureLLMInferenceTrace_conv.csv", 19366), ("mooncake_fast25/conversation_trace.jsonl", 12031)],
)
def test_published_traces_stream_as_they_are_read(data_dir, file, count):
    rows = list(open_workload(str(data_dir / file)))
    assert len(rows) == count
    assert rows == list(open_trace(data_dir / file))
