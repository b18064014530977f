"""A client cannot tell how many replicas worked on its request."""

from __future__ import annotations

import asyncio

import msgspec
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.handoff import Token
from cluster.record import RequestRecord
from tests.gateway.conftest import serving
from tests.gateway.fake_fleet import MODEL, FakeFleet, expected, ids
from workers.replica import refusal

TOKENS = 20


def _break(worker, submit, index):
    worker.break_links()
    return True


def _hang(worker, submit, index):
    worker.hung = True
    return True


def _fail(worker, submit, index):
    request_id = submit.request.request_id
    worker.tokens(
        Token(request_id=request_id, attempt=submit.attempt, index=index, finish="error", error="out of luck", retry=True)
    )
    return True


def _abort(worker, submit, index):
    worker.tokens(Token(request_id=submit.request.request_id, attempt=submit.attempt, index=index, finish="abort"))
    return True


def _skip(worker, submit, index):
    worker.tokens(worker.token(submit, index + 1))
    return True


def first_fault_at(fleet: FakeFleet, cut: int, fault) -> None:
    """Whoever is first to generate token `cut` fails instead, once in the whole fleet."""
    failed = []

    def script(worker, submit, index):
        if failed or index != cut:
            return False
        failed.append(worker)
        return fault(worker, submit, index)

    for worker in fleet.workers.values():
        worker.fault = script


async def text_of(served, prompt: str = "hello", **more) -> str:
    stream = await served.client.completions.create(model=MODEL, prompt=prompt, max_tokens=TOKENS, seed=4, stream=True, **more)
    return "".join([event.choices[0].text async for event in stream if event.choices])


@pytest.mark.parametrize("fault", [_break, _hang, _fail, _abort, _skip])
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, TOKENS - 1))
async def test_a_request_resumes_wherever_it_is_cut(model_dir, fault, cut):
    fleet = FakeFleet("a", "b")
    first_fault_at(fleet, cut, fault)
    async with serving(model_dir, fleet) as served:
        text = await text_of(served)
        metrics = (await served.http.get("/metrics")).text
    assert text == expected(ids("hello"), 4, TOKENS)
    attempts = sorted((submit for worker in fleet.workers.values() for submit in worker.submits), key=lambda one: one.attempt)
    assert [(one.attempt, len(one.generated)) for one in attempts] == [(0, 0), (1, cut)]
    assert attempts[0].replica_id != attempts[1].replica_id
    assert f'mobula_requests_total{{model="{MODEL}",outcome="completed",tenant="default"}} 1.0' in metrics


async def test_what_a_superseded_attempt_still_says_is_dropped(model_dir):
    fleet = FakeFleet("a", "b")
    first_fault_at(fleet, 7, _hang)
    async with serving(model_dir, fleet) as served:
        release = asyncio.Event()
        asking = asyncio.create_task(text_of(served))
        await served.until(lambda: any(worker.hung for worker in fleet.workers.values()))
        hung = next(worker for worker in fleet.workers.values() if worker.hung)
        other = next(worker for worker in fleet.workers.values() if worker is not hung)
        other.hold = release
        await asyncio.wait_for(other.submitted.wait(), 5)
        hung.hung = False
        for index in range(5, TOKENS):
            hung.tokens(hung.token(hung.submits[0], index))
        await asyncio.sleep(0)
        release.set()
        assert await asking == expected(ids("hello"), 4, TOKENS)


async def test_tokens_said_twice_are_shown_once(model_dir):
    def twice(worker, submit, index):
        worker.tokens(worker.token(submit, index))
        return False

    fleet = FakeFleet("a")
    fleet.workers["a"].fault = twice
    async with serving(model_dir, fleet) as served:
        assert await text_of(served) == expected(ids("hello"), 4, TOKENS)


async def test_the_only_replica_is_tried_again_when_it_is_back(model_dir):
    fleet = FakeFleet("a")
    first_fault_at(fleet, 9, _break)
    async with serving(model_dir, fleet) as served:
        assert await text_of(served) == expected(ids("hello"), 4, TOKENS)


async def test_attempts_are_bounded_and_the_error_names_what_was_tried(model_dir):
    fleet = FakeFleet("a", "b")
    for worker in fleet.workers.values():
        worker.fault = _fail
    async with serving(model_dir, fleet, max_attempts=3) as served:
        with pytest.raises(openai.InternalServerError, match=r"3 attempts failed, as many as may: (a, b, a|b, a, b)") as caught:
            await text_of(served)
    assert caught.value.status_code == 503


async def test_a_whole_step_of_replicas_that_drain_costs_no_request(model_dir):
    """They are the idlest there are, and the gateway has not heard that they drain."""
    leaving = ("a", "b", "c", "d", "e")
    fleet = FakeFleet(*leaving, "f")

    def refuse(worker, submit, index):
        worker.tokens(refusal(submit, "draining, not ready", retry=True))
        return True

    for name in leaving:
        fleet.workers[name].fault = refuse
    async with serving(model_dir, fleet, max_attempts=2) as served:
        texts = await asyncio.gather(*(text_of(served) for _ in range(8)))
    assert texts == [expected(ids("hello"), 4, TOKENS)] * 8


async def test_a_replica_that_refuses_again_and_again_is_not_asked_for_ever(model_dir):
    fleet = FakeFleet("a")

    def refuse(worker, submit, index):
        worker.tokens(refusal(submit, "a prefill replica", retry=True))
        return True

    fleet.workers["a"].fault = refuse
    async with serving(model_dir, fleet, max_attempts=2) as served:
        with pytest.raises(openai.InternalServerError, match="2 attempts failed, as many as may: a, a"):
            await text_of(served)


async def test_attempts_that_advance_the_stream_are_not_counted(model_dir):
    fleet, faulty = FakeFleet("a", "b"), {3, 6, 9, 12}

    def fail_once(worker, submit, index):
        if index not in faulty:
            return False
        faulty.discard(index)
        return _fail(worker, submit, index)

    for worker in fleet.workers.values():
        worker.fault = fail_once
    async with serving(model_dir, fleet, max_attempts=2) as served:
        assert await text_of(served) == expected(ids("hello"), 4, TOKENS)
    assert not faulty


async def test_a_stream_that_cannot_go_on_ends_in_an_error_event(model_dir):
    fleet = FakeFleet("a")
    fleet.workers["a"].fault = lambda worker, submit, index: index == 3 and _fail(worker, submit, index)
    async with serving(model_dir, fleet, max_attempts=2) as served:
        with pytest.raises(openai.APIError, match="2 attempts failed"):
            await text_of(served)


async def test_a_worker_that_leaves_the_table_finishes_its_stream(model_dir):
    fleet = FakeFleet("a", "b")
    async with serving(model_dir, fleet) as served:
        for worker in fleet.workers.values():
            worker.hold = asyncio.Event()
        asking = asyncio.create_task(text_of(served))
        await served.until(lambda: any(worker.submits for worker in fleet.workers.values()))
        worker = next(worker for worker in fleet.workers.values() if worker.submits)
        fleet.publish(*(other.row for other in fleet.workers.values() if other is not worker))
        await served.until(lambda: len(served.gateway.dispatcher._replicas) == 1)
        worker.hold.set()
        assert await asking == expected(ids("hello"), 4, TOKENS)
        assert sum(len(other.submits) for other in fleet.workers.values()) == 1


async def test_two_hundred_streams_outlive_a_worker(model_dir):
    fleet = FakeFleet("a", "b", "c")
    first_fault_at(fleet, 10, _break)
    async with serving(model_dir, fleet) as served:
        texts = await asyncio.gather(*(text_of(served, f"{'abcdefghij'[row % 10]}") for row in range(200)))
    assert texts == [expected(ids("abcdefghij"[row % 10]), 4, TOKENS) for row in range(200)]


async def test_a_resume_does_not_change_what_the_client_is_told_of_its_prompt(model_dir, tmp_path):
    def another_account(worker, submit, index):
        token = worker.token(submit, index)
        if submit.attempt == 1 and index == 7:
            token = msgspec.structs.replace(token, times=(9.0, 9.0, 9.0), cached_tokens=12)
        worker.tokens(token)
        return False

    fleet = FakeFleet("a", "b")
    broken = []

    def script(worker, submit, index):
        if not broken and index == 7:
            broken.append(worker)
            return _break(worker, submit, index)
        return another_account(worker, submit, index)

    for worker in fleet.workers.values():
        worker.fault = script
    async with serving(model_dir, fleet, request_log=str(tmp_path)) as served:
        answer = await served.client.completions.create(model=MODEL, prompt="hello", max_tokens=TOKENS, seed=4)
    (path,) = tmp_path.glob("*.jsonl")
    record = msgspec.json.decode(path.read_bytes(), type=RequestRecord)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert (record.attempts, record.prefill_s, record.cached_tokens) == (2, 0.002, 3)
    assert sorted(record.replicas) == ["a", "b"]


async def test_a_request_waits_for_a_replica_after_the_table_lost_all_of_them(model_dir):
    fleet = FakeFleet("a", "b")
    async with serving(model_dir, fleet) as served:
        for worker in fleet.workers.values():
            worker.hold = asyncio.Event()
        asking = asyncio.create_task(text_of(served))
        await served.until(lambda: any(worker.submits for worker in fleet.workers.values()))
        worker = next(worker for worker in fleet.workers.values() if worker.submits)
        other = next(one for one in fleet.workers.values() if one is not worker)
        fleet.empty()
        await served.until(lambda: not served.gateway.dispatcher.ready())
        worker.break_links()
        worker.reachable = False
        await served.until(lambda: served.gateway.dispatcher.waiting == 1)
        other.hold.set()
        fleet.publish(other.row)
        assert await asking == expected(ids("hello"), 4, TOKENS)


async def test_a_failing_tick_and_a_failing_table_do_not_end_the_watch(model_dir, monkeypatch, caplog):
    fleet = FakeFleet("a", "b")
    first_fault_at(fleet, 5, _hang)
    async with serving(model_dir, fleet) as served:
        dispatcher = served.gateway.dispatcher
        for owner, name in ((dispatcher._links, "check_silence"), (dispatcher._links, "update")):
            fails_once(monkeypatch, owner, name)
        fleet.publish()
        await served.until(lambda: "a bug in check_silence" in caplog.text and "a bug in update" in caplog.text)
        assert await text_of(served) == expected(ids("hello"), 4, TOKENS)


def fails_once(monkeypatch, owner: object, name: str) -> None:
    def fail(*_):
        monkeypatch.setattr(owner, name, working)
        raise RuntimeError(f"a bug in {name}")

    working = getattr(owner, name)
    monkeypatch.setattr(owner, name, fail)
