"""Every trace format reads to the same rows, and a broken line is named."""

import gzip
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidTrace
from cluster.kv import blocks_for
from cluster.record import TraceRow, to_line
from workloads.traces import open_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
BURSTGPT = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,s1,1.5,ChatGPT,472,18,490,Conversation log\n45.5,,1.5,GPT-4,1087,0,1087,API log\n"
)
MOONCAKE = (
    '{"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [0, 1]}\n'
    '{"timestamp": 4500, "input_length": 600, "output_length": 6, "hash_ids": [0, 2]}'
)


@pytest.fixture
def written(tmp_path):
    def write(content):
        path = tmp_path / "trace"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def row(arrival_s, prompt_tokens, output_tokens, **more):
    return TraceRow(arrival_s=arrival_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens, **more)


def test_azure_2023_rows(written):
    first, second = open_trace(written(AZURE))
    assert first == row(0.0, 374, 44)
    assert (second.arrival_s, second.prompt_tokens) == (pytest.approx(4.314579), 396)


def test_azure_2024_times_carry_a_zone_and_may_lack_a_fraction(written):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00+00:00,2399,7\n2024-05-10 00:00:00.009930+00:00,76,15\n"
    assert [each.arrival_s for each in open_trace(written(text))] == [0.0, pytest.approx(0.00993, abs=1e-6)]


def test_burstgpt_rows_with_and_without_sessions(written):
    assert list(open_trace(written(BURSTGPT))) == [row(0.0, 472, 18, session_id="s1"), row(40.5, 1087, 0)]
    old = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n"
    assert list(open_trace(written(old))) == [row(0.0, 472, 18)]


def test_mooncake_rows_keep_their_blocks(written):
    blocks = {"block_tokens": 512}
    rows = [row(0.0, 700, 5, block_hashes=(0, 1), **blocks), row(1.5, 600, 6, block_hashes=(0, 2), **blocks)]
    assert list(open_trace(written(MOONCAKE))) == rows


TEXT = st.text(max_size=8)
ROWS = st.builds(
    TraceRow,
    arrival_s=st.floats(0, 1e9),
    prompt_tokens=st.integers(1, 2**20),
    output_tokens=st.integers(0, 2**20),
    block_hashes=st.lists(st.integers(0, 2**64 - 1), max_size=4).map(tuple),
    block_tokens=st.integers(1, 4096),
    tenant=TEXT,
    slo_class=TEXT,
    priority=st.integers(-100, 100),
    session_id=st.none() | TEXT,
)


@given(rows=st.lists(ROWS, min_size=1, max_size=5).map(lambda rows: sorted(rows, key=lambda row: row.arrival_s)))
def test_own_format_round_trips(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("own") / "trace.jsonl"
    path.write_bytes(b"".join(map(to_line, rows)))
    assert list(open_trace(path)) == rows


@pytest.mark.parametrize(
    ("content", "line", "value", "expected"),
    [
        (AZURE + "2023-11-16 18:15:51.2224670,87", 4, "18:15:51.2224670,87", "3 fields"),
        (AZURE + "2023-11-16 18:15:51.2224670,x,5", 4, "'x'", "ContextTokens as a whole number"),
        (AZURE + "2023-11-16 18:15:51.2224670,-1,5", 4, "'-1'", "ContextTokens as a whole number"),
        (AZURE + "yesterday,1,5", 4, "'yesterday'", "TIMESTAMP like"),
        (AZURE + "2023-11-16 18:15:46.0,1,5", 4, "18:15:46.0", "not before that of the row above it; it is 4.99517 s before"),
        (AZURE + "2023-11-16 18:15:51.5,1048577,5", 4, "'1048577'", "ContextTokens as a whole number in [0, 1048576]"),
        (AZURE + "2093-11-16 18:15:51.5,7,5", 4, "'2093-11-16 18:15:51.5'", "at most 1e+09 s after the first row's"),
        (BURSTGPT + "nan,,1,GPT-4,1,1,2,API log", 4, "'nan'", "Timestamp as seconds"),
        (MOONCAKE + '\n{"timestamp": 5000, "input_le', 3, "input_le", "whole JSON record"),
        (MOONCAKE + '\n{"timestamp": 5000, "input_length": -7, "output_length": 1, "hash_ids": []}', 3, "-7", "input_length"),
        (to_line(row(0.0, 5, 5)) + to_line(row(1.0, 5, 5))[:-9], 2, "arrival_s", "whole JSON record"),
        (to_line(row(0.0, 5, 5)).replace(b'"schema":1', b'"schema":9'), 1, "schema", "schema"),
        (to_line(row(0.0, 5, 2**40)), 1, "'1099511627776'", "output_tokens of at most 1048576"),
        (to_line(row(1e300, 5, 5)), 1, "'1e+300'", "arrival_s of at most 1e+09"),
        (to_line(row(0.0, 5, 5, block_hashes=(1, 2**64))), 1, "'18446744073709551616'", "block_hashes of at most"),
        (to_line(row(0.0, 5, 5, priority=101)), 1, "priority", "<= 100"),
        (to_line(row(0.0, 5, 5)).replace(b'"arrival_s":0.0,', b""), 1, "schema", "missing required field `arrival_s`"),
        (to_line(row(0.0, 5, 5)).replace(b'"arrival_s":0.0,', b'"arrival_s":1e999,'), 1, "schema", "out of range"),
        (
            MOONCAKE + '\n{"timestamp": 5000, "input_length": 7, "output_length": 1, "hash_ids": [18446744073709551616]}',
            3,
            "'184",
            "hash_ids",
        ),
        (MOONCAKE.replace("4500", "NaN"), 2, "NaN", "whole JSON record"),
        (
            MOONCAKE + '\n{"input_length": 7, "output_length": 1, "hash_ids": []}',
            3,
            "input_length",
            "missing required field `timestamp`",
        ),
        (AZURE + ",1,5", 4, "''", "TIMESTAMP like"),
        (BURSTGPT + ",,1,GPT-4,1,1,2,API log", 4, "''", "Timestamp as seconds"),
        (BURSTGPT + "44,,1,GPT-4,1,1,2,API log", 4, "'44'", "it is 1.5 s before"),
        (b"\x00\xff\xfe", 1, "no text in UTF-8", "a header with TIMESTAMP"),
        ('{"a": 1}', 1, "a", "hash_ids (Mooncake)"),
    ],
)
def test_a_broken_line_is_named_with_its_value_and_what_was_expected(written, content, line, value, expected):
    path = written(content)
    with pytest.raises(InvalidTrace) as caught:
        list(open_trace(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert value in message
    assert expected in message


def test_a_line_without_end_does_not_fill_the_memory(written, monkeypatch):
    monkeypatch.setattr("workloads.traces.MAX_LINE_BYTES", 100)
    with pytest.raises(InvalidTrace, match="100 bytes"):
        open_trace(written(b"x" * 1000))


@pytest.mark.parametrize(("content", "words"), [("\n\n", "is empty"), (gzip.compress(AZURE.encode()), "is compressed by gzip")])
def test_a_file_that_is_no_trace_at_all_is_named(written, content, words):
    with pytest.raises(InvalidTrace, match=f"trace: {words}"):
        open_trace(written(content))


def test_ends_of_lines_and_byte_order_marks_of_other_systems_are_read(written):
    assert list(open_trace(written("\ufeff" + AZURE.replace("\n", "\r\n")))) == list(open_trace(written(AZURE)))


def test_a_missing_file_is_an_invalid_trace(tmp_path):
    with pytest.raises(InvalidTrace, match="No such file"):
        open_trace(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("file", "count", "last_s"),
    [
        ("azure_llm_2023/AzureLLMInferenceTrace_conv.csv", 19366, 3501.72),
        ("mooncake_fast25/conversation_trace.jsonl", 12031, 3536.999),
    ],
)
def test_published_traces_read_whole(data_dir, file, count, last_s):
    rows = list(open_trace(data_dir / file))
    assert len(rows) == count
    assert rows[-1].arrival_s == pytest.approx(last_s, abs=0.01)


@pytest.mark.parametrize(
    ("file", "prompt", "output"),
    [
        ("azure_llm_2023/AzureLLMInferenceTrace_conv.csv", (1020, 1155), (129, 211)),
        ("mooncake_fast25/conversation_trace.jsonl", (None, 12035), (None, 343)),
    ],
)
def test_published_traces_have_their_published_lengths(data_dir, file, prompt, output):
    """Median and mean, to the token. Mooncake's README gives means only."""
    rows = list(open_trace(data_dir / file))
    for (median, mean), lengths in (
        (prompt, [row.prompt_tokens for row in rows]),
        (output, [row.output_tokens for row in rows]),
    ):
        assert median in (None, statistics.median(lengths))
        assert statistics.mean(lengths) == pytest.approx(mean, abs=1.0)


def test_mooncakes_rows_have_a_hash_for_each_block_of_their_prompts(data_dir):
    for row in open_trace(data_dir / "mooncake_fast25/conversation_trace.jsonl"):
        assert len(row.block_hashes) == blocks_for(row.prompt_tokens, row.block_tokens)


def test_a_week_of_azure_2024_keeps_its_times(written):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    text += "".join(f"2024-05-{day} 23:59:59.999999+00:00,{day},{day}\n" for day in range(10, 20))
    assert list(open_trace(written(text))) == [row(86400.0 * at, 10 + at, 10 + at) for at in range(10)]


def test_burstgpt_logs_of_both_kinds_and_fractions_of_seconds_are_read(written):
    lines = (
        BURSTGPT.splitlines()[0],
        "0.5,17,0.8,ChatGPT,21,5,26,Conversation log",
        "0.5,,7,GPT-4,1,0,1,API log",
        "1e7,17,,ChatGPT,99,4,103,Conversation log",
    )
    rows = [row(0.0, 21, 5, session_id="17"), row(0.0, 1, 0), row(1e7 - 0.5, 99, 4, session_id="17")]
    assert list(open_trace(written("\n".join(lines)))) == rows
