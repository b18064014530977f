"""Keys: shown once, kept as hashes, and followed while the gateway runs."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from cli.keys import app as keys_app
from cluster.errors import InvalidConfig, NotAllowed
from gateway.keys import CHECK_S, Keyring, add_key, read_keys
from tests.gateway.fake_fleet import MODEL, FakeFleet


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_key_taken_out_of_the_file_opens_nothing_and_a_new_one_does(tmp_path, clock):
    path = str(tmp_path / "keys")
    old = add_key(path, "acme")
    keyring = Keyring(path, unreadable=pytest.fail, clock=clock)
    assert keyring.check(old).tenant == "acme"
    (tmp_path / "keys").unlink()
    new = add_key(path, "bolt")
    clock.now_s += CHECK_S
    assert keyring.check(new).tenant == "bolt"
    with pytest.raises(NotAllowed):
        keyring.check(old)


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("{\n"), lambda path: path.unlink()])
def test_a_file_that_cannot_be_read_any_more_leaves_the_keys_and_is_told_once(tmp_path, clock, caplog, spoil):
    path = tmp_path / "keys"
    key = add_key(str(path), "acme")
    told = []
    keyring = Keyring(str(path), unreadable=lambda: told.append(path), clock=clock)
    spoil(path)
    for _ in range(3):
        clock.now_s += CHECK_S
        assert keyring.check(key).tenant == "acme"
    assert told == [path]
    assert f"keys file {path}" in caplog.text


async def test_a_key_bounds_the_priority_that_its_requests_may_ask_for(serve, tmp_path):
    path = str(tmp_path / "keys")
    plain, urgent = add_key(path, "acme"), add_key(path, "acme", max_priority=5)
    asked = {"model": MODEL, "prompt": "ab", "max_tokens": 1, "priority": 5}
    async with serve(FakeFleet("a"), keys_file=path) as served:
        refused, taken = [
            await served.http.post("/v1/completions", json=asked, headers={"authorization": f"Bearer {key}"})
            for key in (plain, urgent)
        ]
    assert refused.json()["error"]["message"] == "priority 5 is outside [-100, 0]"
    assert (refused.status_code, taken.status_code) == (400, 200)


def test_keys_are_shown_once_and_kept_as_hashes(tmp_path):
    path = tmp_path / "keys"
    added = CliRunner().invoke(keys_app, ["add", str(path), "--tenant", "acme"])
    listed = CliRunner().invoke(keys_app, ["list", str(path)])
    key = added.output.strip()
    assert key.startswith("mob-")
    assert key.split("-", 2)[2] not in path.read_text()
    assert listed.output.split() == [key.split("-")[1], "acme", "0"]
    assert path.stat().st_mode & 0o077 == 0


def test_a_broken_keys_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "keys"
    add_key(str(path), "acme")
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(InvalidConfig, match="line 2"):
        read_keys(str(path))
    with pytest.raises(InvalidConfig, match="No such file"):
        read_keys(str(tmp_path / "none"))
