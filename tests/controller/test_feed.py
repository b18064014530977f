"""Telemetry is read in the background: no pass waits for it, and no failure of it ends anything."""

import asyncio
import logging
import math
from collections.abc import Mapping, Sequence

from cluster.errors import Unreachable
from controller.observe.counters import Series
from controller.observe.feed import TelemetryFeed

ONE = (Series(name="x", times_s=(1.0,), values=(1.0,)),)
OTHER = (Series(name="x", times_s=(2.0,), values=(2.0,)),)


class Told:
    """A source that answers with what it is told to, one after another, and then never."""

    def __init__(self, *answers: Sequence[Series] | Exception) -> None:
        self._answers = list(answers)
        self.exhausted = asyncio.Event()

    async def series(self, names: Sequence[str], now_s: float) -> Mapping[str, Sequence[Series]]:
        if not self._answers:
            self.exhausted.set()
            await asyncio.Event().wait()
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return dict.fromkeys(names, answer)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def test_the_last_good_answer_stays_in_force_and_ages(caplog):
    clock = Clock()
    feed = TelemetryFeed(Told(ONE, Unreachable("gone"), ValueError("nonsense"), OTHER), ["x"], clock)
    assert (feed.latest(), feed.age_s) == ({}, math.inf)
    ages = []
    for latest in (ONE, ONE, ONE, OTHER):
        await feed.read()
        ages.append(feed.age_s)
        assert feed.latest() == {"x": latest}
        clock.now_s += 10.0
    assert ages == [0.0, 10.0, 20.0, 0.0]
    assert feed.errors == 2


async def test_the_log_says_once_that_reading_fails_and_once_that_it_works_again(caplog):
    feed = TelemetryFeed(Told(*[Unreachable("gone")] * 50, ONE, ONE, Unreachable("gone")), ["x"], Clock())
    with caplog.at_level(logging.INFO):
        for _ in range(53):
            await feed.read()
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "telemetry is not read any more: gone",
        "telemetry is read again",
        "telemetry is not read any more: gone",
    ]


async def test_a_source_that_hangs_is_given_up_and_asked_anew():
    feed = TelemetryFeed(Told(), ["x"], Clock(), read_s=0.01)
    await feed.read()
    await feed.read()
    assert feed.errors == 2


async def test_reading_goes_on_through_failures():
    source = Told(ONE, Unreachable("gone"), OTHER)
    feed = TelemetryFeed(source, ["x"], Clock(), period_s=0.001)
    running = asyncio.create_task(feed.run())
    await asyncio.wait_for(source.exhausted.wait(), 5)
    running.cancel()
    assert feed.latest() == {"x": OTHER}
