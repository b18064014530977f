"""Claims about the gateway's port: shared within a fleet, never between programs, however willing the other is to share."""

import pytest

from cluster.errors import InvalidConfig
from gateway import port
from gateway.port import refuse_strangers
from gateway.server import address_of, listen

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
    monkeypatch.setattr(port, "SIBLING_S", 0.0)


@pytest.fixture
def taken():
    """A listener that shares its port with whoever asks for it the same way."""
    with listen(HOST, 0) as listener:
        yield listener


@pytest.fixture
def sibling():
    with listen(HOST, 0) as listener:
        yield address_of(listener)


def test_a_free_port_is_anybodys(taken):
    free = taken.getsockname()[1]
    taken.close()
    refuse_strangers(HOST, free, list)
    listen(HOST, free).close()


def test_a_port_of_another_program_is_refused_though_it_would_share(taken):
    at = taken.getsockname()[1]
    with pytest.raises(InvalidConfig, match=f"gateway.port {at} on 127.0.0.1 is taken by another program"):
        refuse_strangers(HOST, at, list)


@pytest.mark.parametrize("host", ["0.0.0.0", "localhost"])
def test_another_name_of_the_same_address_is_taken_too(taken, host):
    with pytest.raises(InvalidConfig, match=f"on {host} is taken"):
        refuse_strangers(host, taken.getsockname()[1], list)


def test_a_sibling_shares(taken, sibling):
    refuse_strangers(HOST, taken.getsockname()[1], lambda: [sibling])
    listen(HOST, taken.getsockname()[1]).close()


def test_a_sibling_that_is_known_only_later_is_waited_for(taken, sibling, monkeypatch):
    monkeypatch.setattr(port, "SIBLING_S", 60.0)
    monkeypatch.setattr(port, "RETRY_S", 0.0)
    known = iter(([], [], [sibling]))
    refuse_strangers(HOST, taken.getsockname()[1], lambda: next(known))


def test_a_sibling_on_another_host_does_not_vouch_for_who_listens_here(taken, sibling):
    with listen(HOST, 0) as elsewhere:
        nobody_here = address_of(elsewhere)
    with pytest.raises(InvalidConfig, match="another program"):
        refuse_strangers(HOST, taken.getsockname()[1], lambda: [nobody_here])


def test_a_port_that_is_let_go_while_asked_for_is_had(taken, monkeypatch):
    monkeypatch.setattr(port, "SIBLING_S", 60.0)
    monkeypatch.setattr(port, "RETRY_S", 0.0)
    refuse_strangers(HOST, taken.getsockname()[1], lambda: taken.close() or [])
