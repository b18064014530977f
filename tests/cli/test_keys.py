"""`mobula keys`: a key is shown once and its hash kept; bad input is one line."""

import pytest

from cli.main import main
from gateway.keys import Keyring


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["keys", *arguments])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_an_added_key_opens_and_is_listed_without_itself(tmp_path, capsys):
    file = str(tmp_path / "keys.json")
    _, key, _ = run(capsys, "add", file, "--tenant", "research")
    assert Keyring(file, unreadable=lambda: None).check(key.strip()).tenant == "research"
    _, listed, _ = run(capsys, "list", file)
    assert "research" in listed
    assert key.strip() not in listed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["list", "none.json"], "none.json: No such file"),
        (["add", "none/keys.json", "--tenant", "a"], "No such file"),
        (["add", "keys.json", "--tenant", ""], "--tenant '' is empty"),
        (["add", "keys.json", "--tenant", "a\nb"], "is empty or not printable"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
