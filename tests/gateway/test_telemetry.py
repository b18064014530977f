"""Counters are told every second, and a controller that is away costs nothing."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry, Counter

from cluster.metrics import Sample, samples
from gateway import telemetry


def test_samples_are_named_as_prometheus_names_them():
    registry = CollectorRegistry()
    Counter("mobula_x_total", "X.", ["model"], registry=registry).labels("m").inc(3)
    found = samples(registry, {"mobula_x_total"}, instance="a:1")
    assert found == (Sample("mobula_x_total", (("instance", "a:1"), ("model", "m")), 3.0),)


async def test_pushes_go_on_after_failures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(telemetry, "PUSH_S", 0.01)
    pushed, thrice = [], asyncio.Event()

    async def push(at_s: float, taken: tuple[Sample, ...]) -> None:
        pushed.append(taken)
        if len(pushed) == 1:
            raise ConnectionError("nobody is there")
        if len(pushed) == 3:
            thrice.set()

    one = (Sample("x", (), 1.0),)
    pushing = asyncio.create_task(telemetry.push_samples(lambda: one, push))
    await asyncio.wait_for(thrice.wait(), 5)
    pushing.cancel()
    assert pushed[:3] == [one] * 3
