"""What cannot be simulated is refused before anything is, with its line and value; what can is reported whole."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from cli import simulate as command
from cli.main import main
from cluster.performance import PerformanceModel
from cluster.record import TraceRow, to_line
from cluster.step_table import step_table_of, write_table
from simulator import simulation
from simulator.result import Result

ROOT = Path(__file__).parents[2]
FEW = "poisson:rate=4,minutes=0.5,prompt=fixed(100),output=fixed(8)"
FLEET = """
name: two
models: [{name: m, path: ./nowhere}]
nodes:
  - {name: a, pool: p, accelerator: h100, slots: 2, price_usd_per_hour: 4}
  - {name: b, pool: p, accelerator: h100, slots: 2, price_usd_per_hour: 4}
replicas:
  - {role: decode, pool: p, count: 2, max_replicas: 4, kv_blocks: 128, pace: {shape: llama-3.1-8b, accelerator: h100}}
gateway: {keys_file: keys.json}
slo: {default: {ttft_s: 1.0, tpot_s: 0.1}, batch: {e2e_s: 60}}
"""


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(FLEET)
    return path


def run(*words: str | Path) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", "--warm-up", "0", *(str(word) for word in words)])
    return ended.value.code


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> str:
    """The one line of the refusal, which came before a simulation was so much as made."""
    monkeypatch.setattr(simulation, "Simulation", None)
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("mobula: error: ")
    assert error.count("\n") == 1
    return error.removeprefix("mobula: error: ").strip()


def log(path: Path, *rows: TraceRow) -> Path:
    path.write_bytes(b"".join(map(to_line, rows)))
    return path


def row(arrival_s: float, prompt: int = 100, **more: object) -> TraceRow:
    return msgspec.convert({"arrival_s": arrival_s, "prompt_tokens": prompt, "output_tokens": 8, **more}, TraceRow)


# Results


def test_a_fleet_is_simulated_without_its_model_and_keys(fleet, capsys):
    assert run(FEW, "-f", fleet) == 0
    out = capsys.readouterr().out
    assert re.search(r"100.0% of \d+ requests within their SLO", out)
    assert re.search(r"default +TTFT +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +1,000", out)
    assert "requests per CPU second" in out.replace("\n", " ")
    assert "warning: m/decode/p: prompts and KV tokens: roofline" in out
    assert max(map(len, out.splitlines())) <= 110


@pytest.mark.parametrize("file", ["deploy/local.yaml", "deploy/simulate-40.yaml", "README.md"])
def test_configs_of_this_repository_can_be_simulated(file, tmp_path, capsys):
    path = ROOT / file
    if file == "README.md":
        found = re.search(r"```yaml\n(# cluster.yaml.*?)```", path.read_text(), re.DOTALL)
        assert found
        path = tmp_path / "cluster.yaml"
        path.write_text(found[1])
    assert run(FEW, "-f", path, "--json") == 0
    result = msgspec.json.decode(capsys.readouterr().out.splitlines()[-1], type=Result)
    assert result.completed == result.arrived > 50


def test_json_and_the_same_seed_give_the_same_results(fleet, capsys):
    def once(seed: int) -> Result:
        assert run(FEW, "-f", fleet, "--json", "--seed", str(seed)) == 0
        found = msgspec.json.decode(capsys.readouterr().out, type=Result)
        return msgspec.structs.replace(found, cpu_s=0.0, requests_per_cpu_s=0.0, peak_rss_mb=0.0)

    assert once(1) == once(1) != once(2)


def test_bounds_of_the_default_class_may_be_given(fleet, capsys):
    assert run(FEW, "-f", fleet, "--json", "--slo-ttft", "0.02") == 0
    found = msgspec.json.decode(capsys.readouterr().out, type=Result)
    assert found.classes["default"].slo.ttft_s == 0.02
    assert found.classes["default"].slo.tpot_s == 0.1


def test_an_interrupted_run_keeps_what_it_has_found(fleet, tmp_path, capsys, monkeypatch):
    def stop(self: object, now_s: float, arrived: int, share: float) -> None:
        if now_s > 10.0:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.Progress, "simulated", stop)
    requests, page = tmp_path / "requests.parquet", tmp_path / "run.html"
    assert run(FEW, "-f", fleet, "--report", page, "--parquet", requests) == 130
    out = capsys.readouterr().out
    assert "interrupted after 0:11 of simulated time; so far 100.0% of" in " ".join(out.split())
    assert "Interrupted" in page.read_text()
    parquet = pytest.importorskip("pyarrow.parquet")
    assert 0 < parquet.read_metadata(requests).num_rows < 120


def test_every_request_is_a_row_of_the_parquet_file(fleet, tmp_path, capsys, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("simulator.requests_file.GROUP_ROWS", 16)
    trace = log(tmp_path / "log.jsonl", *(row(0.1 * n, tenant=f"t{n % 2}", slo_class="batch", priority=n % 3) for n in range(40)))
    file = tmp_path / "requests.parquet"
    assert run(trace, "-f", fleet, "--parquet", file) == 0
    table = parquet.read_table(file)
    assert parquet.read_metadata(file).num_row_groups == 3
    rows = sorted(table.to_pylist(), key=lambda each: each["arrival_s"])
    assert [(each["tenant"], each["priority"]) for each in rows] == [(f"t{n % 2}", n % 3) for n in range(40)]
    for each in rows:
        assert (each["outcome"], each["reason"], each["slo_class"], each["attempts"]) == ("completed", None, "batch", 1)
        assert each["e2e_s"] == pytest.approx(each["ttft_s"] + 7 * each["tpot_s"])
        assert 0.0 <= each["queue_s"] < each["ttft_s"]
        assert each["decode_replica"].startswith("decode-p-")


def test_rejected_requests_are_rows_with_their_reason(tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    path, file = tmp_path / "cluster.yaml", tmp_path / "requests.parquet"
    path.write_text(FLEET.replace("{keys_file: keys.json}", "{allow_anonymous: true, max_queue: 1}"))
    trace = log(tmp_path / "log.jsonl", *(row(0.0, 1900) for _ in range(40)))
    assert run(trace, "-f", path, "--parquet", file, "--json") == 0
    found = msgspec.json.decode(capsys.readouterr().out, type=Result)
    rows = parquet.read_table(file).to_pylist()
    assert len(rows) == 40
    assert sum(found.rejected.values()) > 0
    for why, count in found.rejected.items():
        assert sum(each["reason"] == why and each["outcome"] == "rejected" for each in rows) == count


# Bad traces


def test_a_prompt_longer_than_every_replica_holds_is_named_with_its_line(fleet, tmp_path, capsys, monkeypatch):
    trace = log(tmp_path / "log.jsonl", row(0.0), row(1.0, 2041), row(2.0))
    assert refused(capsys, monkeypatch, trace, "-f", fleet) == (
        f"{trace}:2: 2041 prompt and 8 output tokens are 2049, above 2048, the most that a replica holds (m/decode/p); "
        "raise kv_blocks, or cut prompts and outputs"
    )


def test_a_prompt_that_just_fits_or_is_cut_is_simulated(fleet, tmp_path, capsys):
    assert run(log(tmp_path / "log.jsonl", row(0.0, 2040)), "-f", fleet) == 0
    assert run(log(tmp_path / "log.jsonl", row(0.0, 20400)), "-f", fleet, "--max-prompt-tokens", "2040") == 0


def test_lines_are_named_in_a_log_that_is_put_in_order(fleet, tmp_path, capsys, monkeypatch):
    trace = log(tmp_path / "log.jsonl", row(5.0), row(9.0, 9000), row(1.0))
    assert refused(capsys, monkeypatch, trace, "-f", fleet).startswith(
        f"{trace}:2: 9000 prompt and 8 output tokens are 9008, above 2048"
    )


def test_an_unknown_slo_class_is_named_with_its_line(fleet, tmp_path, capsys, monkeypatch):
    trace = log(tmp_path / "log.jsonl", row(0.0, slo_class="batch"), row(1.0, slo_class="gold"))
    error = refused(capsys, monkeypatch, trace, "-f", fleet)
    assert error == f"{trace}:2: slo_class 'gold' is none of this fleet's, under `slo`: batch, default"


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6,374,44\n2023-11-16 18:15:50.9,396,109\n"
BURSTGPT = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,,1,GPT-4,1,1,2,API log\n"
)
BROKEN = {
    "unsorted": (AZURE + "2023-11-16 18:15:47.9,10,10", 4, "expected a time not before that of the row above it; it is 3 s before"),
    "a negative time": (BURSTGPT + "-1,,1,GPT-4,1,1,2,API log", 3, "'-1': expected Timestamp as seconds >= 0"),
    "a missing time": (AZURE + ",10,10", 4, "'': expected TIMESTAMP like"),
    "truncated": (AZURE + "2023-11-16 18:15:51.2,8", 4, "'2023-11-16 18:15:51.2,8': expected 3 fields"),
    "a truncated record": (
        '{"timestamp": 0, "input_length": 7, "output_length": 1, "hash_ids": []}\n{"timestamp": 9, "inp',
        2,
        "a whole",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_line_is_found_before_anything_is_simulated(what, fleet, tmp_path, capsys, monkeypatch):
    content, line, words = BROKEN[what]
    trace = tmp_path / "trace"
    trace.write_text(content)
    error = refused(capsys, monkeypatch, trace, "-f", fleet)
    assert error.startswith(f"{trace}:{line}: ")
    assert words in error


def test_what_comes_after_the_chosen_minutes_is_not_read(fleet, tmp_path, capsys):
    trace = tmp_path / "trace"
    trace.write_text(AZURE + "2023-11-16 18:35:50.9,396,109\nbroken")
    assert run(trace, "-f", fleet, "--minutes", "1") == 0


# Bad fleets and worlds

REFUSED = {
    "weights do not fit": (
        "shape: llama-3.1-8b", "shape: llama-3.1-70b",
        "kv_blocks 128 of llama-3.1-70b are 671088640 bytes beside 141107412992 of weights, above 80000000000, the memory of",
    ),
    "kv does not fit beside the weights": (
        "kv_blocks: 128", "kv_blocks: 28000",
        "replicas[0].kv_blocks 28000: with the weights they take 74.8 GB, above 72.0 GB, 90% of its accelerators' memory; at most",
    ),
    "slo below the believed floor": ("ttft_s: 1.0", "ttft_s: 0.001", "slo.default.ttft_s 0.001 is below"),
    "nobody knows how fast": (
        ", pace: {shape: llama-3.1-8b, accelerator: h100}", "", "replicas[0]: m/decode/p has no pace, so nobody knows how fast",
    ),
    "unknown key": ("max_replicas: 4", "max_replica: 4", "unknown key `replicas[0].max_replica`; did you mean max_replicas"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_fleet_that_cannot_be_is_refused(what, fleet, capsys, monkeypatch):
    old, new, words = REFUSED[what]
    fleet.write_text(FLEET.replace(old, new))
    error = refused(capsys, monkeypatch, FEW, "-f", fleet)
    assert error.startswith(f"{fleet}: ")
    assert words in error


def test_an_slo_below_what_a_calibrated_table_says_is_refused_though_policies_believe_in_it(fleet, tmp_path, capsys, monkeypatch):
    slow = PerformanceModel(step_s=0.2, prefill_token_s=1e-4)
    write_table(tmp_path / "slow.json", step_table_of(slow))
    world = tmp_path / "world.yaml"
    world.write_text("tables: {decode: slow.json}")
    error = refused(capsys, monkeypatch, FEW, "-f", fleet, "--world", world)
    assert error == f"{fleet}: slo.default.tpot_s 0.1 is below 0.2, the fastest replica's, idle and with a prompt of one token"


WORLDS = {
    "unknown key": ("hop: 1", "unknown key `hop`; did you mean hop_s?"),
    "out of bounds": ("hop_s: -1", "hop_s -1: Expected `float` >= 0.0"),
    "unknown kind": ("faults: [{at_s: 1, kind: kil}]", "faults[0].kind 'kil' is none of kill, hang,"),
    "no such node": ("faults: [{at_s: 1, kind: lose_node, target: z}]", "faults[0].target 'z' is none of the nodes: a, b"),
    "no such table": ("tables: {decode: none.json}", "none.json: no step table can be read there"),
    "no spot node there": ("spot_traces: {q: trace.json}", "spot_traces.q: no spot node is in that zone"),
    "no mapping": ("[1, 2]", "holds list, not a mapping of settings"),
}


@pytest.mark.parametrize("what", WORLDS)
def test_a_world_that_cannot_be_is_refused(what, fleet, tmp_path, capsys, monkeypatch):
    content, words = WORLDS[what]
    world = tmp_path / "world.yaml"
    world.write_text(content)
    error = refused(capsys, monkeypatch, FEW, "-f", fleet, "--world", world)
    assert str(world) in error or str(tmp_path / "none.json") in error
    assert words in error


def test_a_warm_up_longer_than_the_workload_is_refused(fleet, tmp_path, capsys, monkeypatch):
    error = refused(capsys, monkeypatch, FEW, "-f", fleet, "--warm-up", "60")
    assert error == "--warm-up 60 is above 30 s, the workload's length: no request would count"
    trace = log(tmp_path / "log.jsonl", row(3.0), row(10.0))
    assert "--warm-up 8 is above 7 s" in refused(capsys, monkeypatch, trace, "-f", fleet, "--warm-up", "8")


def test_a_report_needs_a_directory(fleet, tmp_path, capsys, monkeypatch):
    error = refused(capsys, monkeypatch, FEW, "-f", fleet, "--report", tmp_path / "no" / "run.html")
    assert error == f"--report {tmp_path}/no/run.html: there is no directory {tmp_path}/no"


def test_without_pyarrow_the_refusal_says_how_to_get_it(fleet, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    error = refused(capsys, monkeypatch, FEW, "-f", fleet, "--parquet", tmp_path / "requests.parquet")
    assert error == "--parquet needs pyarrow, which is not installed: pip install 'mobula[parquet]'"
