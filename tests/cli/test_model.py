import pytest

from cli.main import main
from workers.engines.torch_engine import tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBULA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tiny_model, "STEPS", 2)


def run(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["model", "init", *args])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_init_writes_a_checkpoint_and_lets_it_speak(tmp_path, capsys):
    code, out, _ = run(capsys, str(tmp_path / "model"))
    assert code == 0
    assert "Alice" in out
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_an_unknown_preset_is_refused_with_the_known_ones(tmp_path, capsys):
    code, _, err = run(capsys, str(tmp_path / "model"), "--preset", "huge")
    assert (code, err) == (2, "mobula: error: preset 'huge' is none of tiny-dense, tiny-moe\n")
    assert not (tmp_path / "model").exists()


def test_a_directory_with_anything_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = run(capsys, str(tmp_path))
    assert code == 2
    assert err.startswith(f"mobula: error: {tmp_path} is not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_path_below_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, _, err = run(capsys, str(tmp_path / "file" / "model"))
    assert code == 2
    assert "cannot be written" in err
