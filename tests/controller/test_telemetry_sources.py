"""The controller's own window and a Prometheus server say the same of the same samples."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from cluster.errors import Unreachable
from cluster.metrics import Sample
from controller.observe.prometheus import Prometheus
from controller.observe.window import MAX_SERIES, Window

NOW_S = 1_000_000.0
SPAN_S = 60.0
NAMES = ("mobula_arrivals_total", "mobula_tokens_total")
LABELS = (("instance", "a:1"), ("model", "m"))


def pushed() -> list[tuple[float, list[Sample]]]:
    return [
        (NOW_S - 70 + 5 * step, [Sample(name, LABELS, float(step * factor)) for name, factor in zip(NAMES, (3, 100), strict=True)])
        for step in range(15)
    ]


class Server:
    """Answers `/api/v1/query` with what it is told to, or from samples as Prometheus does."""

    def __init__(self) -> None:
        self.answer: Callable[[str, float], Awaitable[web.Response]] = self.from_samples
        self.url = ""

    async def query(self, request: web.Request) -> web.Response:
        form = await request.post()
        return await self.answer(str(form["query"]), float(str(form["time"])))

    async def from_samples(self, query: str, now_s: float) -> web.Response:
        name, _, span = query.partition("[")
        start_s = now_s - float(span.removesuffix("ms]")) / 1000
        values = [
            [at_s, str(sample.value)]
            for at_s, samples in pushed()
            for sample in samples
            if sample.name == name and start_s < at_s <= now_s
        ]
        matrix = {"metric": {"__name__": name, "job": "mobula", **dict(LABELS)}, "values": values}
        return web.json_response({"status": "success", "data": {"resultType": "matrix", "result": [matrix]}})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    app = web.Application()
    app.router.add_post("/api/v1/query", made.query)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


@pytest.fixture
async def prometheus(server: Server) -> AsyncIterator[Prometheus]:
    made = Prometheus(server.url, SPAN_S)
    yield made
    await made.close()


async def test_both_give_identical_series(prometheus: Prometheus):
    window = Window(SPAN_S)
    for at_s, samples in pushed():
        window.add(at_s, samples)
    own, theirs = await window.series(NAMES, NOW_S), await prometheus.series(NAMES, NOW_S)
    assert own == theirs
    assert own[NAMES[0]][0].times_s[0] == NOW_S - SPAN_S
    assert len(own[NAMES[0]][0].times_s) == 13


async def test_window_forgets_what_is_old_and_bounds_what_it_holds():
    window = Window(SPAN_S)
    window.add(NOW_S - 100, [Sample("old", (), 1.0)])
    window.add(NOW_S, [Sample("x", (("n", str(number)),), 1.0) for number in range(MAX_SERIES + 5)])
    assert window.refused == 6
    assert (await window.series(["old"], NOW_S))["old"] == []
    window.add(NOW_S, [Sample("x", (("n", "0"),), 2.0)])
    assert window.refused == 7


def says(body: bytes, status: int = 200) -> Callable[[str, float], Awaitable[web.Response]]:
    async def answer(query: str, now_s: float) -> web.Response:
        return web.Response(body=body, status=status)

    return answer


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>Welcome</html>", "no answer of Prometheus"),
        (b"", "no answer of Prometheus"),
        (b"\xff\xfe", "no answer of Prometheus"),
        (json.dumps({"status": "error", "error": "query timed out"}).encode(), "refuses mobula_arrivals_total: query timed out"),
        (json.dumps({"status": "success", "data": {"resultType": "vector", "result": []}}).encode(), "no range vector"),
        (
            json.dumps(
                {"status": "success", "data": {"resultType": "matrix", "result": [{"metric": {}, "values": [[1, "x"]]}]}}
            ).encode(),
            "no number",
        ),
    ],
)
async def test_nonsense_is_told_as_what_it_is(server: Server, prometheus: Prometheus, body: bytes, said: str):
    server.answer = says(body)
    with pytest.raises(Unreachable, match=said):
        await prometheus.series(NAMES, NOW_S)


async def test_answer_beyond_its_bound_is_not_read_on(server: Server, prometheus: Prometheus, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("controller.observe.prometheus.MAX_ANSWER_BYTES", 100_000)
    server.answer = says(b" " * 1_000_000)
    with pytest.raises(Unreachable, match="more than 100000 bytes"):
        await prometheus.series(NAMES, NOW_S)


async def test_server_that_is_slow_or_gone_is_unreachable(server: Server, prometheus: Prometheus, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("controller.observe.prometheus.TIMEOUT_S", 0.05)
    released = asyncio.Event()

    async def never(query: str, now_s: float) -> web.Response:
        await released.wait()
        return web.Response()

    server.answer = never
    with pytest.raises(Unreachable, match="does not answer"):
        await prometheus.series(NAMES, NOW_S)
    released.set()
    nobody = Prometheus("http://127.0.0.1:1", SPAN_S)
    with pytest.raises(Unreachable, match="does not answer"):
        await nobody.series(NAMES, NOW_S)
    await nobody.close()
