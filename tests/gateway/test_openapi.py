"""The served OpenAPI document, and what happens to a gateway when it is tried at random."""

from __future__ import annotations

import asyncio
import threading

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode

from tests.gateway.conftest import serving
from tests.gateway.fake_fleet import FakeFleet


@pytest.fixture(scope="module")
def api(model_dir):
    """A gateway on a thread of its own."""
    loop, ready, end = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    urls = []

    async def serve() -> None:
        async with serving(model_dir, FakeFleet("a")) as served:
            urls.append(served.url)
            ready.set()
            await end.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    yield schemathesis.openapi.from_url(f"{urls[0]}/openapi.json")
    loop.call_soon_threadsafe(end.set)
    thread.join()
    loop.close()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_request_makes_it_fail(api, mode):
    for found in api.get_all_operations():
        operation = found.ok()
        try:
            cases = operation.as_strategy(generation_mode=mode)
            _try(cases)
        except Unsatisfiable:
            continue  # There is nothing to get wrong: no parameter and no body.


def _try(cases) -> None:
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
    @given(case=cases)
    def attempt(case):
        case.call_and_validate(checks=[not_a_server_error], timeout=10)

    attempt()
