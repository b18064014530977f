"""Many streams at once, and workers that die under them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import openai
import pytest

from tests.live.conftest import APART, LiveFleet, eventually, kill, torch_group

pytestmark = pytest.mark.timeout(400)  # Fleets start inside fixtures.

STREAMS = 200
TOKENS = 40


@pytest.fixture(scope="module")
def fleet(start_fleet: Callable[..., LiveFleet], model_dir: object) -> LiveFleet:
    config = {
        "models": [{"name": "tiny", "path": str(model_dir)}],
        "replicas": [torch_group("prefill", 2), torch_group("decode", 2, kv_blocks=3072)],
        "routing": APART,
    }
    return start_fleet("losses", config)


def prompt(number: int) -> str:
    return f"{number} men went up to the city, and each of them carried {number} loaves. " * 3


async def streamed(fleet: LiveFleet, started: asyncio.Semaphore) -> list[str]:
    """The text of every stream; `started` is released once for each first token."""

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.completions.create(
            model="tiny", prompt=prompt(number), max_tokens=TOKENS, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        text = ""
        async for chunk in stream:
            if chunk.choices:
                if not text:
                    started.release()
                text += chunk.choices[0].text
        return text

    async with fleet.async_client() as client:
        return await asyncio.gather(*(one(client, number) for number in range(STREAMS)))


async def test_all_streams_finish_right_while_a_prefill_and_a_decode_worker_are_killed(fleet: LiveFleet) -> None:
    undisturbed = await streamed(fleet, asyncio.Semaphore(0))
    victims = [fleet.replicas("prefill")[0], fleet.replicas("decode")[0]]
    started = asyncio.Semaphore(0)
    disturbed = asyncio.create_task(streamed(fleet, started))
    for victim in victims:
        for _ in range(STREAMS // 8):
            await started.acquire()
        kill(victim)
    assert await disturbed == undisturbed


async def test_client_that_hangs_up_frees_its_blocks_within_a_second(fleet: LiveFleet) -> None:
    replicas = fleet.replicas()  # Asked for beforehand: `status` takes longer than the second that is promised.

    def held() -> float:
        gauges = ("mobula_replica_kv_blocks_used", "mobula_replica_running")
        return sum(fleet.metric(replica, gauge) for replica in replicas for gauge in gauges)

    async with fleet.async_client() as client:
        stream = await client.completions.create(
            model="tiny", prompt=prompt(1), max_tokens=1500, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        eventually(lambda: held() > 0, "the stream holds blocks")
        await stream.close()
    eventually(lambda: held() == 0, "no block is held and nothing runs", timeout_s=1)
