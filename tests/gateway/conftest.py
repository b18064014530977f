from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import openai
import pytest

from cluster.fleet import GatewaySpec, ModelSpec
from cluster.slo import Slo
from gateway.app import build_app
from gateway.server import GatewayServer
from gateway.telemetry import Push
from policies.routing import PredictedLatencyRouter
from tests.gateway.fake_fleet import MODEL, FakeFleet, tokenizer

TEMPLATE = "{% for message in messages %}{{ message['role'][0] }} {{ message['content'] }}.{% endfor %}"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<eos>"}))
    return path


def trusting(tls_dir: Path | None) -> ssl.SSLContext:
    """A client's context that knows this directory's authority."""
    return ssl.create_default_context(cafile=tls_dir and tls_dir / "ca.pem")


class Served:
    """A gateway on a free port over a fake fleet, and a client of it."""

    def __init__(self, fleet: FakeFleet, server: GatewayServer, app, tls_dir: Path | None) -> None:
        self.fleet = fleet
        self.server = server
        self.app = app
        self.gateway = app.state.gateway
        self.url = f"{'https' if tls_dir else 'http'}://127.0.0.1:{server.port}"
        self.client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.http = httpx.AsyncClient(base_url=self.url, timeout=10.0, verify=trusting(tls_dir))

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 -- a condition on another's state has no event
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serving(
    model_dir: Path,
    fleet: FakeFleet,
    *,
    publish: bool = True,
    tls_dir: Path | None = None,
    push: Push | None = None,
    **settings,
) -> AsyncIterator[Served]:
    if "keys_file" not in settings:
        settings["allow_anonymous"] = True
    spec = GatewaySpec(**{"port": 0, "silence_s": 0.3, "queue_timeout_s": 5.0, **settings})
    app = build_app(
        spec=spec,
        models={MODEL: ModelSpec(name=MODEL, path=str(model_dir))},
        membership=fleet.membership,
        transport=fleet,
        router=PredictedLatencyRouter(),
        slos={"default": Slo(ttft_s=1.0, tpot_s=0.1), "batch": Slo()},
        address="g:1",
        push=push,
    )
    server = GatewayServer(app, spec, tls_dir=tls_dir and str(tls_dir), drain_s=5)
    serve = asyncio.create_task(server.serve())
    reports = asyncio.create_task(fleet.report_all())
    served = Served(fleet, server, app, tls_dir)
    await served.until(lambda: server.started)
    if publish:
        fleet.publish()
        await served.until(lambda: all(worker.links for worker in fleet.workers.values()))
        await served.until(lambda: served.gateway.dispatcher.ready())
    try:
        yield served
    finally:
        await served.client.close()
        await served.http.aclose()
        server.should_exit = True
        await serve
        reports.cancel()


@pytest.fixture
def serve(model_dir) -> Callable[..., contextlib.AbstractAsyncContextManager[Served]]:
    return lambda fleet, **settings: serving(model_dir, fleet, **settings)
