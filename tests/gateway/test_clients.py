"""Keys, disconnects, drain, metrics and the request log."""

from __future__ import annotations

import asyncio
import json

import httpx
import msgspec
import openai
import pytest

from cluster.errors import InvalidConfig
from cluster.fleet import GatewaySpec
from cluster.record import RequestRecord
from gateway.app import build_app
from gateway.keys import add_key, read_keys
from tests.gateway.fake_fleet import MODEL, FakeFleet, expected, ids

OK = {"model": MODEL, "prompt": "hello", "max_tokens": 8, "seed": 0}


async def test_a_client_that_leaves_frees_its_request_everywhere(serve):
    fleet = FakeFleet("a")
    worker = fleet.workers["a"]
    worker.hold = asyncio.Event()
    async with serve(fleet) as served:
        for stream in (True, False):
            worker.submitted.clear(), worker.aborted.clear()
            asking = asyncio.create_task(served.http.post("/v1/completions", json=OK | {"stream": stream}))
            await asyncio.wait_for(worker.submitted.wait(), 5)
            asking.cancel()
            await asyncio.wait_for(worker.aborted.wait(), 1)
            assert worker.aborts[-1].request_id == worker.submits[-1].request.request_id
        await served.until(lambda: served.gateway.dispatcher.in_flight == 0)


async def test_a_client_that_leaves_amid_its_stream_frees_it(serve):
    fleet = FakeFleet("a")
    worker = fleet.workers["a"]
    worker.fault = lambda worker, submit, index: index == 5
    async with serve(fleet) as served:
        async with served.http.stream("POST", "/v1/completions", json=OK | {"stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line:
                    break
        await asyncio.wait_for(worker.aborted.wait(), 1)


async def test_keys_open_the_door_and_name_the_tenant(serve, tmp_path):
    path = str(tmp_path / "keys")
    key = add_key(path, "acme")
    fleet = FakeFleet("a")
    async with serve(fleet, keys_file=path) as served:
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=key)
        async with client:
            answer = await client.completions.create(**OK)
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": f"Bearer {key}x"},
            {"authorization": f"Basic {key}"},
        ):
            refused = await served.http.post("/v1/completions", json=OK, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (await served.http.get("/v1/models")).status_code == 401
        assert (await served.http.get("/health")).status_code == 200
        metrics = (await served.http.get("/metrics")).text
    request = fleet.workers["a"].submits[0].request
    assert (request.tenant, request.salt) == ("acme", "acme")
    key_id = read_keys(path)[0].key_id
    assert answer.usage.completion_tokens == 8
    assert f'mobula_output_tokens_total{{key="{key_id}",model="{MODEL}",tenant="acme"}} 8.0' in metrics


@pytest.mark.parametrize("spec", [GatewaySpec(), GatewaySpec(keys_file="keys", allow_anonymous=True)])
def test_keys_or_their_absence_must_be_chosen(spec):
    with pytest.raises(InvalidConfig, match="either keys_file or allow_anonymous"):
        build_app(spec=spec, models={}, membership=None, transport=None, router=None, slos={})


async def test_a_tenants_flood_leaves_room_for_another(serve, tmp_path):
    path = str(tmp_path / "keys")
    keys = {tenant: add_key(path, tenant) for tenant in ("acme", "bolt")}
    fleet = FakeFleet("a", max_running=1)
    fleet.workers["a"].hold = asyncio.Event()
    async with serve(fleet, keys_file=path, max_queue=2) as served:

        async def ask(tenant: str) -> int:
            headers = {"authorization": f"Bearer {keys[tenant]}"}
            return (await served.http.post("/v1/completions", json=OK, headers=headers)).status_code

        flood = [asyncio.create_task(ask("acme")) for _ in range(3)]
        await served.until(lambda: served.gateway.dispatcher.in_flight == 3)
        other = asyncio.create_task(ask("bolt"))
        await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
        fleet.workers["a"].hold.set()
        answers = sorted(await asyncio.gather(*flood))
        assert await other == 200
    assert answers == [200, 200, 429]


async def test_metrics_count_requests_tokens_and_times(serve):
    async with serve(FakeFleet("a")) as served:
        for _ in range(3):
            await served.client.completions.create(**OK)
        await served.http.post("/v1/completions", json=OK | {"n": 0})
        metrics = (await served.http.get("/metrics")).text
    for line in (
        f'mobula_requests_total{{model="{MODEL}",outcome="completed",tenant="default"}} 3.0',
        f'mobula_prompt_tokens_total{{key="anonymous",model="{MODEL}",tenant="default"}} 15.0',
        f'mobula_cached_tokens_total{{model="{MODEL}"}} 9.0',
        f'mobula_requests_in_flight{{model="{MODEL}"}} 0.0',
        f'mobula_itl_seconds_count{{model="{MODEL}"}} 21.0',
        f'mobula_ttft_seconds_count{{model="{MODEL}"}} 3.0',
        'mobula_rejections_total{reason="invalid_value"} 1.0',
    ):
        assert line in metrics


async def test_a_prompt_is_charged_once_however_many_choices_it_has(serve):
    async with serve(FakeFleet("a")) as served:
        answer = await served.client.completions.create(**OK | {"n": 3})
        metrics = (await served.http.get("/metrics")).text
    for kind, tokens in (("prompt", answer.usage.prompt_tokens), ("output", answer.usage.completion_tokens)):
        assert f'mobula_{kind}_tokens_total{{key="anonymous",model="{MODEL}",tenant="default"}} {tokens}.0' in metrics


async def test_the_request_log_tells_lengths_times_and_the_route_but_no_text(serve, tmp_path):
    fleet = FakeFleet("a")
    async with serve(fleet, request_log=str(tmp_path / "log")) as served:
        for text in ("q" * 40, "q" * 40, "w" * 40):
            await served.client.completions.create(**OK | {"prompt": text}, extra_headers={"x-request-id": f"mine-{text[0]}"})
    (path,) = (tmp_path / "log").glob("*.jsonl")
    same, again, other = (msgspec.json.decode(line, type=RequestRecord) for line in path.read_bytes().splitlines())
    assert (same.prompt_tokens, same.output_tokens, same.outcome, same.attempts, same.cached_tokens) == (40, 8, "completed", 1, 3)
    assert same.route.decode.replica_id == "a"
    assert (same.http_request_id, same.replicas) == ("mine-q", ("a",))
    assert len(same.block_hashes) == 2
    assert same.block_hashes == again.block_hashes != other.block_hashes
    assert same.prefill_s == 0.002
    assert 0 <= same.ttft_s <= same.e2e_s
    assert b"qqq" not in path.read_bytes()


async def test_a_drain_finishes_streams_and_takes_nothing_new(serve):
    fleet = FakeFleet("a")
    worker = fleet.workers["a"]
    worker.hold = asyncio.Event()
    async with serve(fleet) as served:
        idle = httpx.AsyncClient(base_url=served.url)
        await idle.get("/health")
        asking = asyncio.create_task(served.client.completions.create(**OK))
        await asyncio.wait_for(worker.submitted.wait(), 5)
        served.gateway.dispatcher.draining = True
        health, refused = await idle.get("/health"), await idle.post("/v1/completions", json=OK)
        served.server.drain()
        worker.hold.set()
        assert (await asking).choices[0].text == expected(ids("hello"), 0, 8)
        await idle.aclose()
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert json.loads(refused.content)
