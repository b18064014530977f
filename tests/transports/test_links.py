"""Links follow the table, whatever becomes of the streams."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from cluster.errors import Unreachable
from cluster.replica import Membership
from tests.gateway.fake_fleet import FakeFleet
from transports import links
from transports.links import WorkerLinks


class Ear:
    """Remembers what it was told; is busy where it is told to be."""

    def __init__(self) -> None:
        self.is_busy = False
        self.fails = False
        self.losses: asyncio.Queue[str] = asyncio.Queue()
        self.words: asyncio.Queue[object] = asyncio.Queue()

    def heard(self, worker_id, message) -> None:
        if self.fails:
            self.fails = False
            raise RuntimeError("a bug")
        self.words.put_nowait(message)

    def lost(self, worker_id, cause) -> None:
        self.losses.put_nowait(cause)

    def busy(self, worker_id) -> bool:
        return self.is_busy


class CountingFleet(FakeFleet):
    def __init__(self, *names: str) -> None:
        super().__init__(*names)
        self.called: asyncio.Queue[str] = asyncio.Queue()

    async def connect(self, endpoint, gateway_id):
        self.called.put_nowait(endpoint)
        return await super().connect(endpoint, gateway_id)


def table(fleet: FakeFleet, version: int = 1) -> Membership:
    return Membership(version=version, replicas=tuple(worker.row for worker in fleet.workers.values()))


async def linked(fleet: CountingFleet, ear: Ear) -> WorkerLinks:
    made = WorkerLinks(fleet, "gateway", ear, silence_s=2.0)
    made.update(table(fleet))
    await asyncio.wait_for(ear.words.get(), 5)
    await fleet.called.get()
    return made


async def test_a_worker_gone_from_the_table_is_not_called_again_once_its_last_stream_ends(monkeypatch):
    monkeypatch.setattr(links, "FIRST_BACKOFF_S", 0.0)
    fleet, ear = CountingFleet("a"), Ear()
    made = await linked(fleet, ear)
    ear.is_busy = True
    made.update(Membership(version=2))
    assert made.connected("worker-a")
    link = made._links["worker-a"]
    fleet.workers["a"].break_links()
    await asyncio.wait_for(link.task, 5)
    assert fleet.called.empty()
    assert not made._links
    await made.close()


async def test_a_worker_that_moved_while_busy_is_called_where_it_is_now(monkeypatch):
    monkeypatch.setattr(links, "FIRST_BACKOFF_S", 0.0)
    fleet, ear = CountingFleet("a", "b"), Ear()
    moved = msgspec.structs.replace(fleet.workers["b"].row, worker_id="worker-a")
    made = WorkerLinks(fleet, "gateway", ear, silence_s=2.0)
    made.update(Membership(version=1, replicas=(fleet.workers["a"].row,)))
    assert await asyncio.wait_for(fleet.called.get(), 5) == "fake:a"
    await asyncio.wait_for(ear.words.get(), 5)
    ear.is_busy = True
    made.update(Membership(version=2, replicas=(moved,)))
    fleet.workers["a"].break_links()
    assert await asyncio.wait_for(fleet.called.get(), 5) == "fake:b"
    await made.close()


async def test_a_failure_of_the_listener_costs_one_stream_not_the_link(monkeypatch, caplog):
    monkeypatch.setattr(links, "FIRST_BACKOFF_S", 0.0)
    fleet, ear = CountingFleet("a"), Ear()
    made = await linked(fleet, ear)
    ear.fails = True
    fleet.workers["a"].report()
    assert await asyncio.wait_for(ear.losses.get(), 5) == "broken"
    await asyncio.wait_for(ear.words.get(), 5)
    assert made.connected("worker-a")
    assert "a bug" in caplog.text
    await made.close()


async def test_without_a_stream_sending_is_unreachable():
    made = WorkerLinks(FakeFleet(), "gateway", Ear(), silence_s=2.0)
    with pytest.raises(Unreachable, match="nobody"):
        made.send("nobody", None)
