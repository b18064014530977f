"""Counters are told every second, and a controller that is away costs nothing."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.metrics import DEMAND_NAMES, Sample
from gateway import telemetry
from tests.gateway.fake_fleet import MODEL, FakeFleet

ONE = (Sample("x", (), 1.0),)


class Controller:
    """Fails at first so often as told, then takes what it is told."""

    def __init__(self, fail: Callable[[], Awaitable[None]] | None = None, failures: int = 0) -> None:
        self.pushed: list[tuple[float, tuple[Sample, ...]]] = []
        self._fail, self._failures = fail, failures
        self._came = asyncio.Event()

    async def push(self, at_s: float, taken: tuple[Sample, ...]) -> None:
        if self._failures > 0:
            self._failures -= 1
            await self._fail()
        self.pushed.append((at_s, taken))
        self._came.set()

    async def told(self, wanted: Callable[[tuple[Sample, ...]], bool] = bool) -> tuple[Sample, ...]:
        """The next samples that are as wanted."""
        async with asyncio.timeout(10):
            while True:
                self._came.clear()
                await self._came.wait()
                if wanted(self.pushed[-1][1]):
                    return self.pushed[-1][1]


@contextlib.asynccontextmanager
async def pushing(controller: Controller) -> AsyncIterator[None]:
    task = asyncio.create_task(telemetry.push_samples(lambda: ONE, controller.push))
    yield
    task.cancel()


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "PUSH_S", 0.005)
    monkeypatch.setattr(telemetry, "PUSH_TIMEOUT_S", 0.005)


async def gone() -> None:
    raise ConnectionError("nobody is there")


async def hang() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("fail", [gone, hang])
async def test_pushes_go_on_after_failures_which_are_logged_once(soon, caplog, fail):
    controller = Controller(fail, failures=3)
    with caplog.at_level(logging.INFO):
        async with pushing(controller):
            assert await controller.told() == ONE
            assert await controller.told() == ONE
    told = [record.getMessage().split(":")[0] for record in caplog.records if record.name == telemetry.__name__]
    assert told == ["counters reach no controller", "counters reach the controller again"]


async def test_times_are_whole_milliseconds(soon):
    controller = Controller()
    async with pushing(controller):
        await controller.told()
    assert all(at_s == round(at_s, 3) for at_s, _ in controller.pushed)


async def test_what_is_told_is_what_would_be_scraped(serve):
    async with serve(FakeFleet("a")) as served:
        await served.client.completions.create(model=MODEL, prompt="alice", max_tokens=2)
        text = (await served.http.get("/metrics")).text
        told = served.gateway._metrics.samples("g:1")
    scraped = [
        Sample(one.name, tuple(sorted({**one.labels, "instance": "g:1"}.items())), one.value)
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if one.name in DEMAND_NAMES
    ]
    assert told == tuple(sorted(scraped, key=lambda one: (one.name, one.labels)))


async def test_a_gateway_tells_its_counters_from_zero_on(serve, soon):
    controller = Controller()
    async with serve(FakeFleet("a"), push=controller.push) as served:
        first = await controller.told()
        assert {one.name for one in first} == set(DEMAND_NAMES)
        assert {one.value for one in first} == {0.0}
        assert all({"instance": "g:1", "model": MODEL}.items() <= dict(one.labels).items() for one in first)
        await served.client.completions.create(model=MODEL, prompt="alice", max_tokens=2)
        arrivals = ("mobula_arrivals_total", (("instance", "g:1"), ("model", MODEL)), 1.0)
        await controller.told(lambda taken: Sample(*arrivals) in taken)
    assert "push_samples" not in {task.get_coro().__name__ for task in asyncio.all_tasks()}, "it ends with the gateway"
