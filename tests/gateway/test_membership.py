"""The table is followed while there is a registry, kept while there is none, and not lost to a new one that knows nobody yet."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from ray.exceptions import RayActorError

from cluster.replica import Membership
from gateway import membership
from gateway.membership import follow_registry
from tests.gateway.fake_fleet import replica

ROWS = (replica("a"), replica("b"))


class Handle:
    """Answers calls with a script: tables to return, errors to raise. Waits for ever once it has been told."""

    def __init__(self, *script: Membership | Exception) -> None:
        self.script = list(script)
        self.asked: list[int] = []
        self.membership = self

    def remote(self, after_version: int, timeout_s: float, gateway: str) -> Awaitable[Membership]:
        self.asked.append(after_version)
        answer: asyncio.Future[Membership] = asyncio.get_running_loop().create_future()
        if self.script:
            said = self.script.pop(0)
            (answer.set_exception if isinstance(said, Exception) else answer.set_result)(said)
        return answer


@pytest.fixture
def registries(monkeypatch) -> Callable[..., None]:
    """Registries to be found, one after the other; an exception is not to find one."""
    monkeypatch.setattr(membership, "RETRY_S", 0.0)
    monkeypatch.setattr(membership, "SETTLE_S", 0.0)

    def follow_each_other(*found: Handle | Exception) -> None:
        left = iter(found)

        def get_actor(name, namespace):
            said = next(left)
            if isinstance(said, Exception):
                raise said
            return said

        monkeypatch.setattr(membership.ray, "get_actor", get_actor)

    return follow_each_other


async def tables(count: int) -> list[Membership]:
    following = follow_registry("mobula-test", "127.0.0.1:1")
    async with asyncio.timeout(5):
        told = [await anext(following) for _ in range(count)]
    await following.aclose()
    return told


async def test_each_table_is_told_once_and_the_next_is_asked_for(registries):
    one, two = Membership(version=1, replicas=ROWS[:1]), Membership(version=2, replicas=ROWS)
    handle = Handle(one, one, two)
    registries(handle)
    assert await tables(2) == [one, two]
    assert handle.asked == [-1, 1, 1]


async def test_without_a_registry_nothing_is_told_until_it_is_found_again(registries):
    table, later = Membership(version=1, replicas=ROWS[:1]), Membership(version=2, replicas=ROWS)
    registries(
        ValueError("none yet"), Handle(table, RayActorError()), RuntimeError("no Ray"), Handle(TimeoutError()), Handle(later)
    )
    assert await tables(2) == [table, later]


async def test_a_new_registry_is_followed_once_workers_had_time_to_find_it(registries):
    old = Membership(version=57, registry="old", replicas=ROWS)
    empty, whole = Membership(version=0, registry="new"), Membership(version=2, registry="new", replicas=ROWS)
    new = Handle(empty, whole)
    registries(Handle(old, RayActorError()), new)
    assert await tables(2) == [old, whole]
    assert new.asked == [57, -1]
