"""Bad input: one clear error in OpenAI's shape, and nothing sent to a worker."""

from __future__ import annotations

import asyncio
import inspect
import socket
import time

import msgspec
import openai
import pytest
import pytest_asyncio

from cluster.errors import InvalidConfig
from cluster.handoff import Token
from cluster.record import RequestRecord
from gateway.server import listen
from tests.gateway.conftest import serving
from tests.gateway.fake_fleet import CONTEXT_TOKENS, MODEL, FakeFleet

OK = {"model": MODEL, "prompt": "ab", "max_tokens": 2}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("completions", b"{", 400, None, "invalid_json"),
        ("completions", b"", 400, None, "invalid_json"),
        ("completions", b'{"model": "\xff"}', 400, None, "invalid_utf8"),
        ("completions", b'{"model": "\\ud800", "prompt": "a"}', 400, None, "invalid_json"),
        ("completions", b"[" * 100_000, 400, None, None),
        ("completions", [], 400, None, "invalid_type"),
        ("completions", {"model": MODEL}, 400, "prompt", "missing_required_parameter"),
        ("completions", OK | {"model": "unknown"}, 404, "model", "model_not_found"),
        ("completions", OK | {"max_tokens": "2"}, 400, "max_tokens", "invalid_type"),
        ("completions", OK | {"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ("completions", OK | {"max_tokens": 10**30}, 400, "max_tokens", "context_length_exceeded"),
        ("completions", OK | {"max_tokens": CONTEXT_TOKENS}, 400, "max_tokens", "context_length_exceeded"),
        ("completions", OK | {"prompt": "a" * CONTEXT_TOKENS}, 400, "prompt", "context_length_exceeded"),
        ("completions", OK | {"prompt": ""}, 400, "prompt", "invalid_value"),
        ("completions", OK | {"prompt": []}, 400, "prompt", "invalid_value"),
        ("completions", OK | {"prompt": ["a", 1]}, 400, "prompt", "invalid_value"),
        ("completions", OK | {"prompt": [-1]}, 400, "prompt", "invalid_value"),
        ("completions", OK | {"prompt": [10**9]}, 400, "prompt", "invalid_value"),
        ("completions", OK | {"prompt": [[]]}, 400, "prompt", "invalid_value"),
        ("completions", OK | {"n": 0}, 400, "n", "invalid_value"),
        ("completions", OK | {"n": 129}, 400, "n", "invalid_value"),
        ("completions", OK | {"n": 65, "prompt": ["a", "b"]}, 400, "n", "invalid_value"),
        ("completions", OK | {"temperature": 2.1}, 400, "temperature", "invalid_value"),
        ("completions", OK | {"top_p": -0.1}, 400, "top_p", "invalid_value"),
        ("completions", OK | {"seed": 2**63}, 400, "seed", "invalid_value"),
        ("completions", OK | {"min_tokens": 3}, 400, "min_tokens", "invalid_value"),
        ("completions", OK | {"stop": ["a"] * 17}, 400, "stop", "invalid_value"),
        ("completions", OK | {"stop": ""}, 400, "stop", "invalid_value"),
        ("completions", OK | {"stop": ["a", 1]}, 400, "stop[1]", "invalid_type"),
        ("completions", OK | {"stop_token_ids": [-1]}, 400, "stop_token_ids", "invalid_value"),
        ("completions", OK | {"logprobs": 21}, 400, "logprobs", "invalid_value"),
        ("completions", OK | {"echo": True}, 400, "echo", "unsupported_parameter"),
        ("completions", OK | {"suffix": "x"}, 400, "suffix", "unsupported_parameter"),
        ("completions", OK | {"best_of": 2}, 400, "best_of", "unsupported_parameter"),
        ("completions", OK | {"logit_bias": {"1": 5}}, 400, "logit_bias", "unsupported_parameter"),
        ("completions", OK | {"stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
        ("completions", OK | {"slo_class": "gold"}, 400, "slo_class", "invalid_value"),
        ("completions", OK | {"timeout_s": 0}, 400, "timeout_s", "invalid_value"),
        ("completions", OK | {"timeout_s": 3601}, 400, "timeout_s", "invalid_value"),
        ("completions", OK | {"priority": 101}, 400, "priority", "invalid_value"),
        ("completions", OK | {"tempreature": 1}, 400, "tempreature", "unknown_parameter"),
        ("chat/completions", CHAT | {"messages": []}, 400, "messages", "invalid_value"),
        ("chat/completions", CHAT | {"messages": [{"role": "king", "content": "a"}]}, 400, "messages[0].role", "invalid_type"),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "x": 1}]}, 400, "messages[0].x", "unknown_parameter"),
        ("chat/completions", CHAT | {"messages": [{"role": "user"}]}, 400, "messages[0].content", "missing_required_parameter"),
        (
            "chat/completions",
            CHAT | {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            400,
            "messages[0].tool_calls",
            "unsupported_parameter",
        ),
        ("chat/completions", CHAT | {"tools": [{}]}, 400, "tools", "unsupported_parameter"),
        ("chat/completions", CHAT | {"response_format": {"type": "json_object"}}, 400, "response_format", "unsupported_parameter"),
        ("chat/completions", CHAT | {"top_logprobs": 2}, 400, "top_logprobs", "invalid_value"),
        ("chat/completions", CHAT | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
    ],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_bad_bodies_get_an_error_that_names_the_field(shared, path, body, status, param, code):
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = await shared.http.post(f"/v1/{path}", **content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    assert shared.fleet.workers["a"].submits == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(model_dir):
    """One gateway for all: nothing here reaches a worker."""
    async with serving(model_dir, FakeFleet("a"), max_body_bytes=200_000) as served:
        yield served


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
async def test_every_parameter_of_the_official_client_is_served_or_refused_by_its_name(serve, endpoint):
    async with serve(FakeFleet("a")) as served:
        create = served.client.completions.create if endpoint == "completions" else served.client.chat.completions.create
        of_transport = {"extra_headers", "extra_query", "extra_body", "timeout"}
        bodies = {"completions": OK, "chat": CHAT | {"max_tokens": 1}}
        for name in inspect.signature(create).parameters.keys() - bodies[endpoint].keys() - of_transport:
            answer = await served.http.post(create_path(endpoint), json=bodies[endpoint] | {name: {"odd": 1}})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"].partition(".")[0]) == (400, name)
            assert error["code"] in ("unsupported_parameter", "invalid_type", "unknown_parameter")
            assert name == "stream_options" or error["code"] != "unknown_parameter"


def create_path(endpoint: str) -> str:
    return "/v1/completions" if endpoint == "completions" else "/v1/chat/completions"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"response_format": {"type": "json_object"}},
            'response_format {"type":"json_object"} is not supported here, only {"type":"text"}',
        ),
        ({"audio": {}}, "audio {} is not supported here"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "Invalid enum value 'tool' - at `$.messages[0].role`, which is one of system, developer, user, assistant",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "Invalid enum value 'image_url' - at `$.messages[0].content[0].type`, which is one of text",
        ),
    ],
)
async def test_a_refusal_names_what_was_given_and_what_may_be(serve, body, message):
    async with serve(FakeFleet("a")) as served:
        answer = await served.http.post("/v1/chat/completions", json=CHAT | body)
    assert answer.json()["error"]["message"] == message


async def test_an_error_does_not_send_back_all_it_was_given(serve):
    async with serve(FakeFleet("a")) as served:
        for body in (OK | {"model": "x" * 100_000}, OK | {"y" * 100_000: 1}):
            answer = await served.http.post("/v1/completions", json=body)
            assert answer.status_code in (400, 404)
            assert len(answer.content) < 4000


async def test_bad_utf8_is_placed_in_the_body(serve):
    async with serve(FakeFleet("a")) as served:
        answer = await served.http.post("/v1/completions", content=b'{"model":"tiny","prompt":"ab\xff"}')
    assert answer.json()["error"]["message"] == "the body is not UTF-8 at byte 28"


async def test_neutral_values_of_unsupported_fields_change_nothing(serve):
    async with serve(FakeFleet("a")) as served:
        extra = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}, "store": False}
        answer = await served.http.post("/v1/chat/completions", json=CHAT | extra | {"max_tokens": 1, "audio": None})
    assert answer.status_code == 200


async def test_the_context_error_names_value_and_bound(serve):
    async with serve(FakeFleet("a")) as served:
        with pytest.raises(openai.BadRequestError, match="prompt of 2 tokens and max_tokens 255 make 257, above 256"):
            await served.client.completions.create(**OK | {"max_tokens": 255})


async def test_a_body_above_the_bound_is_413_announced_or_not(serve):
    async def pieces():
        for _ in range(20):
            yield b"x" * 100

    async with serve(FakeFleet("a"), max_body_bytes=1000) as served:
        announced = await served.http.post("/v1/completions", content=b"x" * 1001)
        chunked = await served.http.post("/v1/completions", content=pieces())
    assert (announced.status_code, chunked.status_code) == (413, 413)
    assert announced.json()["error"]["code"] == "body_too_large"


async def test_unknown_paths_and_methods_answer_in_the_same_shape(serve):
    async with serve(FakeFleet("a")) as served:
        missing, wrong = await served.http.get("/v2"), await served.http.get("/v1/completions")
        slash = await served.http.post("/v1/completions/", json=OK)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert (slash.status_code, slash.json()["error"]["code"]) == (404, "not_found")


async def test_request_ids_are_echoed_made_up_or_refused(serve):
    async with serve(FakeFleet("a")) as served:
        given = await served.http.post("/v1/completions", json=OK, headers={"x-request-id": "mine-1"})
        made = await served.http.post("/v1/completions", json=OK)
        refused = await served.http.post("/v1/completions", json=OK, headers={"x-request-id": "a b"})
        named = {"x-request-id": "mine-2"}
        failed = await served.http.post("/v1/completions", json=OK | {"n": 0}, headers=named)
        others = [
            await served.http.get(path, headers=named) for path in ("/v1/models", "/v1/models/unknown", "/v2", "/v1/completions")
        ]
    assert given.headers["x-request-id"] == "mine-1"
    assert len(made.headers["x-request-id"]) == 32
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-request-id")
    assert len(refused.headers["x-request-id"]) == 32
    assert {one.headers["x-request-id"] for one in (failed, *others)} == {"mine-2"}


async def test_an_engine_that_refuses_is_told_to_the_client(serve):
    def refuse(worker, submit, index):
        worker.tokens(Token(request_id=submit.request.request_id, attempt=0, index=0, finish="error", error="too odd"))
        return True

    fleet = FakeFleet("a")
    fleet.workers["a"].fault = refuse
    async with serve(fleet) as served:
        with pytest.raises(openai.BadRequestError, match="too odd"):
            await served.client.completions.create(**OK)


async def test_without_a_ready_replica_it_is_503_and_live(serve):
    async with serve(FakeFleet("a"), publish=False) as served:
        with pytest.raises(openai.InternalServerError) as caught:
            await served.client.completions.create(**OK)
        health, live = await served.http.get("/health"), await served.http.get("/health/live")
    assert caught.value.status_code == 503
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert (health.status_code, live.status_code) == (503, 200)


async def test_beyond_the_queue_it_is_429_with_a_retry_after(serve):
    fleet = FakeFleet("a", max_running=1)
    fleet.workers["a"].hold = asyncio.Event()
    async with serve(fleet, max_queue=2) as served:
        line = served.gateway.dispatcher
        asked = [asyncio.create_task(served.client.completions.create(**OK)) for _ in range(8)]
        await served.until(lambda: sum(one.done() for one in asked) + line.in_flight == 8)
        refused = [one.exception() for one in asked if one.done()]
        fleet.workers["a"].hold.set()
        await asyncio.wait(asked)
    assert refused
    for error in refused:
        assert isinstance(error, openai.RateLimitError)
        assert int(error.response.headers["retry-after"]) >= 1
    assert sum(one.exception() is None for one in asked) == 8 - len(refused)


async def test_what_is_refused_is_neither_in_flight_nor_charged_but_logged(serve, tmp_path):
    fleet = FakeFleet("a", max_running=1)
    fleet.workers["a"].hold = asyncio.Event()
    async with serve(fleet, max_queue=0, request_log=str(tmp_path)) as served:
        served_one = asyncio.create_task(served.client.completions.create(**OK))
        await asyncio.wait_for(fleet.workers["a"].submitted.wait(), 5)
        refused = await served.http.post("/v1/completions", json=OK | {"n": 3})
        held = (await served.http.get("/metrics")).text
        fleet.workers["a"].hold.set()
        await served_one
        metrics = (await served.http.get("/metrics")).text
    (path,) = tmp_path.glob("*.jsonl")
    outcomes = [msgspec.json.decode(line, type=RequestRecord).outcome for line in path.read_bytes().splitlines()]
    assert refused.status_code == 429
    assert f'mobula_requests_in_flight{{model="{MODEL}"}} 1.0' in held
    assert f'mobula_prompt_tokens_total{{key="anonymous",model="{MODEL}",tenant="default"}} 2.0' in metrics
    assert f'mobula_requests_total{{model="{MODEL}",outcome="rejected",tenant="default"}} 1.0' in metrics
    assert 'mobula_rejections_total{reason="Overloaded"} 1.0' in metrics
    assert f'mobula_arrivals_total{{model="{MODEL}"}} 2.0' in metrics
    assert f'mobula_arrived_prompt_tokens_squared_total{{model="{MODEL}"}} 8.0' in metrics
    assert outcomes == ["rejected", "completed"]


async def test_who_waits_too_long_is_counted_as_refused(serve):
    fleet = FakeFleet("a", max_running=1)
    fleet.workers["a"].hold = asyncio.Event()
    async with serve(fleet, queue_timeout_s=0.1) as served:
        served_one = asyncio.create_task(served.client.completions.create(**OK))
        await asyncio.wait_for(fleet.workers["a"].submitted.wait(), 5)
        overdue = await served.http.post("/v1/completions", json=OK)
        metrics = (await served.http.get("/metrics")).text
        fleet.workers["a"].hold.set()
        await served_one
    assert overdue.status_code == 429
    assert 'mobula_rejections_total{reason="Overloaded"} 1.0' in metrics


async def test_who_waits_for_a_model_whose_replicas_are_gone_is_told_so(serve):
    fleet = FakeFleet("a", max_running=1)
    fleet.workers["a"].hold = asyncio.Event()
    async with serve(fleet, queue_timeout_s=0.5) as served:
        asked = [asyncio.create_task(served.http.post("/v1/completions", json=OK)) for _ in range(2)]
        await served.until(lambda: served.gateway.dispatcher.waiting == 1)
        fleet.empty()
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        fleet.workers["a"].hold.set()
        refused = done.pop().result()
        await asyncio.wait(asked)
    assert refused.status_code == 503
    assert refused.json()["error"]["message"] == f"no replica of {MODEL} is ready"


async def test_who_has_no_token_by_its_own_deadline_is_told_so_wherever_it_waited(serve):
    fleet = FakeFleet("a", max_running=1)
    fleet.workers["a"].hold = asyncio.Event()
    async with serve(fleet) as served:
        held = asyncio.create_task(served.http.post("/v1/completions", json=OK))
        await asyncio.wait_for(fleet.workers["a"].submitted.wait(), 5)
        queued = await served.http.post("/v1/completions", json=OK | {"timeout_s": 0.1})
        fleet.workers["a"].hold.set()
        await held
    assert queued.status_code == 408
    assert queued.json()["error"]["code"] == "deadline_exceeded"


async def test_a_deadline_reaches_the_engine_and_its_word_the_client(serve):
    fleet = FakeFleet("a")
    worker = fleet.workers["a"]
    worker.hold = asyncio.Event()
    async with serve(fleet) as served:
        asked = asyncio.create_task(served.http.post("/v1/completions", json=OK | {"timeout_s": 0.05}))
        await asyncio.wait_for(worker.submitted.wait(), 5)
        request = worker.submits[0].request
        assert request.deadline_s == pytest.approx(request.arrival_s + 0.05)
        await served.until(lambda: time.time() > request.deadline_s)
        late = Token(request_id=request.request_id, attempt=0, index=0, finish="error", error="late by 0.1 s", retry=False)
        worker.tokens(late)
        answer = await asked
    assert (answer.status_code, answer.json()["error"]["message"]) == (408, "late by 0.1 s")


async def test_the_queues_depth_is_told_while_requests_wait_and_after(serve):
    fleet = FakeFleet("a", max_running=1)
    fleet.workers["a"].hold = asyncio.Event()
    async with serve(fleet) as served:
        asked = [asyncio.create_task(served.client.completions.create(**OK)) for _ in range(3)]
        await served.until(lambda: served.gateway.dispatcher.waiting == 2)
        waiting = (await served.http.get("/metrics")).text
        fleet.workers["a"].hold.set()
        await asyncio.gather(*asked)
        fleet.workers["a"].report()
        none = (await served.http.get("/metrics")).text
    assert f'mobula_queue_depth{{model="{MODEL}"}} 2.0' in waiting
    assert f'mobula_queue_depth{{model="{MODEL}"}} 0.0' in none


def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidConfig, match=f"127.0.0.1:{port}: Address already in use"):
            listen("127.0.0.1", port)
