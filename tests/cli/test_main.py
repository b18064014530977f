import subprocess
import sys

import pytest

from cli import main as cli
from cluster.errors import InvalidConfig, Overloaded


def test_help_names_every_subcommand_and_imports_none():
    code = (
        "import sys, cli.main\n"
        "try: cli.main.main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'ray', 'transformers', 'fastapi', 'numpy', 'cli.model', 'cli.up'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f" {name} " in done.stdout for name in cli.SUBCOMMANDS)


@pytest.mark.parametrize(("error", "code"), [(InvalidConfig("port 1 taken"), 2), (Overloaded("port 1 taken"), 75)])
def test_an_error_of_ours_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code):
    def fail(directory: str) -> None:
        raise error

    monkeypatch.setattr(cli, "_attribute", lambda target: fail)
    with pytest.raises(SystemExit) as ended:
        cli.main(["up", "somewhere"])
    assert ended.value.code == code
    assert capsys.readouterr().err == "mobula: error: port 1 taken\n"


def test_a_function_becomes_a_command_with_its_own_arguments(monkeypatch, capsys):
    def status(name: str, count: int = 1) -> None:
        print(name * count)

    monkeypatch.setattr(cli, "_attribute", lambda target: status)
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", "ray", "--count", "2"])
    assert not ended.value.code
    assert capsys.readouterr().out == "rayray\n"


def test_an_unknown_subcommand_is_refused_by_name(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["fly"])
    assert ended.value.code == 2
    assert "fly" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["chaos", "config", "journal", "keys", "model"])
def test_help_of_a_subcommand_offers_nothing_that_is_the_commands_own(name: str, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert "--install-completion" not in capsys.readouterr().out


def test_model_init_help_shows_its_presets_without_training(capsys):
    with pytest.raises(SystemExit):
        cli.main(["model", "init", "--help"])
    assert "tiny-moe" in capsys.readouterr().out
