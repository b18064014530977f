"""The open-loop client counts exactly what a server says, whatever the server does."""

import asyncio
import json

import pytest
from aiohttp import web

from cluster.record import TraceRow
from workloads.client import Target, run


def rows(count, output_tokens=4, gap_s=0.0):
    return [TraceRow(arrival_s=i * gap_s, prompt_tokens=10 + i, output_tokens=output_tokens) for i in range(count)]


class Server:
    """Streams `max_tokens` events. `pieces` cuts what it writes; `fail` misbehaves for the request of that number."""

    def __init__(self):
        self.bodies, self.headers = [], []
        self.piece_bytes = None
        self.fail = {}
        self.gate = None
        self.crowd, self.crowded = 0, asyncio.Event()

    async def models(self, request):
        return web.json_response({"object": "list", "data": [{"id": "tiny"}]})

    async def complete(self, request):
        number, body = len(self.bodies), await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers)
        if len(self.bodies) == self.crowd:
            self.crowded.set()
        fail = self.fail.get(number)
        if self.gate:
            await self.gate.wait()
        if isinstance(fail, int):
            return web.json_response({"error": {"message": "no"}}, status=fail)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        chat = request.path.endswith("chat/completions")
        events = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}] if chat else []
        for index in range(body["max_tokens"]):
            last = index == body["max_tokens"] - 1
            said = {"delta": {"content": f"t{index} "}} if chat else {"text": f"t{index} "}
            events.append({"choices": [{"index": 0, **said, "finish_reason": "length" if last else None}], "usage": None})
        prompt = 7 if chat or isinstance(body["prompt"], str) else len(body["prompt"])
        usage = {"prompt_tokens": prompt, "completion_tokens": body["max_tokens"], "prompt_tokens_details": {"cached_tokens": 3}}
        events.append({"choices": [], "usage": usage})
        if fail == "error event":
            events[2:] = [{"error": {"message": "worker lost"}}]
        data = b": hello\n\n" + b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
        if fail == "drop":
            await response.write(data[: len(data) // 2])
            request.transport.abort()
            return response
        if fail == "short":
            data = data[: data.index(b'{"choices": []')]
        if fail == "garbage":
            data = b"data: {nonsense\n\n"
        for start in range(0, len(data), self.piece_bytes or len(data)):
            await response.write(data[start : start + (self.piece_bytes or len(data))])
            if self.piece_bytes:
                await asyncio.sleep(0)
        await response.write_eof()
        return response


@pytest.fixture
async def server():
    server = Server()
    app = web.Application()
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/v1/completions", server.complete)
    app.router.add_post("/v1/chat/completions", server.complete)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


def target(server, **more):
    return Target(url=server.url, model="tiny", **more)


async def only(server, **more):
    load = await run(rows(1), target(server, **more))
    return load.samples[0]


async def test_prompts_and_outputs_have_the_traces_lengths(server):
    load = await run(rows(5), target(server))
    assert sorted(len(body["prompt"]) for body in server.bodies) == [10, 11, 12, 13, 14]
    assert all(body["ignore_eos"] and body["min_tokens"] == body["max_tokens"] == 4 for body in server.bodies)
    assert sorted(sample.prompt_tokens for sample in load.samples) == [10, 11, 12, 13, 14]
    assert [sample.timing.output_tokens for sample in load.samples] == [4] * 5
    assert all(sample.timing.completed and len(sample.timing.itl_s) == 3 for sample in load.samples)
    assert load.in_flight == 0


@pytest.mark.parametrize(("most", "sent"), [(None, [-1, None, 5]), (2, [-1, None, 2]), (0, [-1, None, None])])
async def test_priorities_are_sent_as_far_as_the_key_allows(server, most, sent):
    urgent = [TraceRow(arrival_s=0.0, prompt_tokens=5, output_tokens=1, priority=priority) for priority in (-1, 0, 5)]
    for each in urgent:
        await run([each], target(server, max_priority=most))
    assert [body.get("priority") for body in server.bodies] == sent


@pytest.mark.parametrize("piece_bytes", [1, 7, 64])
@pytest.mark.parametrize("api", ["completions", "chat"])
async def test_events_may_be_split_anywhere(server, api, piece_bytes):
    server.piece_bytes = piece_bytes
    sample = await only(server, api=api)
    assert sample.timing.error is None
    assert sample.text == "t0 t1 t2 t3 "
    assert (sample.timing.output_tokens, len(sample.timing.itl_s), sample.cached_tokens) == (4, 3, 3)


async def test_chat_and_text_send_words(server):
    await only(server, api="chat")
    await only(server, text=True, force_length=False)
    chat, text = server.bodies
    assert len(chat["messages"][0]["content"].split()) == len(text["prompt"].split()) == 8
    assert "ignore_eos" not in text


async def test_the_key_is_sent(server):
    await only(server, key="secret")
    assert server.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("fail", "error", "detail"),
    [
        (429, "rejected (429)", "no"),
        (500, "http 500", "no"),
        ("error event", "error event", "worker lost"),
        ("drop", "disconnected", ""),
        ("short", "disconnected", "after 4 tokens"),
        ("garbage", "bad event", "malformed"),
    ],
)
async def test_a_failure_is_told_by_kind(server, fail, error, detail):
    server.fail = {0: fail}
    sample = await only(server)
    assert sample.timing.error == error
    assert detail in sample.detail
    assert not sample.timing.completed


async def test_nobody_listening_is_an_error_of_each_request():
    load = await run(rows(2), Target(url="http://127.0.0.1:1", model="tiny"))
    assert [sample.timing.error for sample in load.samples] == ["cannot connect"] * 2


async def test_a_request_that_takes_too_long_times_out(server):
    server.gate = asyncio.Event()
    sample = await only(server, timeout_s=0.05)
    server.gate.set()
    assert sample.timing.error == "timeout"


async def test_sending_does_not_wait_for_answers(server):
    server.gate, server.crowd = asyncio.Event(), 20
    running = asyncio.create_task(run(rows(20), target(server)))
    await server.crowded.wait()
    server.gate.set()
    load = await running
    assert (load.peak_in_flight, load.held) == (20, 0)


async def test_the_in_flight_bound_holds_and_its_wait_counts_as_latency(server):
    load = await run(rows(6), target(server, max_in_flight=2))
    assert load.peak_in_flight == 2
    assert load.held > 0
    assert all(sample.timing.ttft_s >= sample.send_lag_s for sample in load.samples)
