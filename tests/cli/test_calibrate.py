from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import main
from cluster.hardware import accelerator
from cluster.models import model_shape
from cluster.performance import roofline
from cluster.step_table import read_table
from tests.workers.torch_engine.tiny import CONFIGS, save_model

MODEL = roofline(model_shape("llama-3.1-8b"), accelerator("h100")).scaled(2.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(CONFIGS["llama"], tmp_path_factory.mktemp("calibrated") / "llama")


def fleet_file(directory: Path, group: str, path: Path | str = "none") -> Path:
    file = directory / "cluster.yaml"
    file.write_text(
        f"models: [{{name: tiny, path: {path}}}]\n"
        f"gateway: {{allow_anonymous: true}}\n"
        f"replicas:\n  - {{role: decode, {group}}}\n  - {{role: prefill, {group}}}\n"
    )
    return file


def calibrate(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = 0
    try:
        main(["calibrate", *map(str, args)])
    except SystemExit as ended:
        code = int(ended.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


EMULATED = "engine: emulated, kv_blocks: 2048, pace: {shape: llama-3.1-8b, accelerator: h100, speedup: 2}"


def test_an_emulated_engine_gives_its_model_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = fleet_file(tmp_path, EMULATED)
    code, out, _ = calibrate(capsys, tmp_path / "table.json", "-f", file, "--json")
    assert code == 0
    told, table = json.loads(out), read_table(tmp_path / "table.json")
    assert max(point["error"] for point in told["points"]) < 0.01
    assert told["fit"]["held_out_largest_error"] < 0.01
    for name in ("step_s", "prefill_token_s", "prefill_pair_s", "sequence_s", "kv_token_s"):
        assert getattr(table.affine(), name) == pytest.approx(getattr(MODEL, name), rel=0.01)
    for batch, kv_tokens in ((1, 500), (8, 8000), (48, 20_000)):
        assert table.decode_step_s(batch, kv_tokens) == pytest.approx(MODEL.decode_step_s(batch, kv_tokens), rel=0.01)
    for tokens, cached in ((100, 0), (400, 0), (3000, 2800)):
        assert table.prefill_s(tokens, cached) == pytest.approx(MODEL.prefill_s(tokens, cached), rel=0.01)
    assert (table.idle_w, table.prefill_w) == (MODEL.idle_w, MODEL.prefill_w)
    assert (table.fit.model, table.fit.hardware) == ("llama-3.1-8b", "h100")


def test_a_torch_engine_without_pace_is_measured(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = fleet_file(tmp_path, "engine: torch, kv_blocks: 64, max_running: 4, step_budget_tokens: 64", checkpoint)
    bounds = ("--rounds", 1, "--max-prompt", 128, "--max-batch", 2)
    code, out, _ = calibrate(capsys, tmp_path / "table.json", "-f", file, *bounds, "--json")
    assert code == 0
    told, table = json.loads(out), read_table(tmp_path / "table.json")
    assert table.fit.hardware == "cpu"
    assert table.fit.sequences == (1.0, 2.0)
    assert table.fit.prefill_tokens[1] == 64.0
    assert {point["steps"] for point in told["points"]} == {1, 2}
    assert all(point["measured_s"] > 0.0 and point["fitted_s"] > 0.0 for point in told["points"])
    # Prefixes were found in the cache: some prompts of one step attend to more than themselves.
    assert any(p["prefill_pairs"] > p["prefill_tokens"] * (p["prefill_tokens"] + 1) / 2 for p in told["points"] if p["steps"] == 1)


def test_people_are_shown_what_was_measured_and_how_well_it_is_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = fleet_file(tmp_path, EMULATED)
    code, out, _ = calibrate(capsys, tmp_path / "table.json", "-f", file, "--max-prompt", 256, "--max-batch", 4)
    assert code == 0
    assert "measured ms" in out
    assert "mean error 0.0%, largest 0.0%" in out
    assert "held out" in out
    assert f"written: {tmp_path / 'table.json'}" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--group", "expert"), "expert is no group or role of fleet mobula"),
        (("--max-prompt", "8"), "--max-prompt"),
    ],
)
def test_bad_wishes_are_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], message: str
) -> None:
    code, _, err = calibrate(capsys, tmp_path / "table.json", "-f", fleet_file(tmp_path, EMULATED), *args)
    assert code == 2
    assert message in err
    assert not (tmp_path / "table.json").exists()


def test_a_table_that_could_not_be_written_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = calibrate(capsys, tmp_path / "none" / "table.json", "-f", fleet_file(tmp_path, EMULATED))
    assert (code, "there is no directory" in err) == (2, True)


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = calibrate(capsys, "--help")
    assert code == 0
    assert "mobula calibrate cpu.json -f cluster.yaml" in " ".join(out.split())
