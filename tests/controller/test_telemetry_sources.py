"""The controller's own window and a Prometheus server say the same of the same samples."""

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

import pytest
from aiohttp import web

from cluster.errors import Unreachable
from cluster.metrics import TTFT, Sample
from controller.observe import prometheus as module
from controller.observe.counters import Series
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
        self.answer: Callable[[str, float], Awaitable[web.StreamResponse]] = self.from_samples
        self.asked: list[tuple[float, float]] = []
        self.more: dict[str, str] = {"job": "mobula", "fleet": "f", "component": "gateway", "zone": "z"}
        self.url = ""

    async def query(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        return await self.answer(str(form["query"]), float(str(form["time"])))

    async def from_samples(self, query: str, now_s: float) -> web.Response:
        names, span = re.fullmatch(r'{__name__=~"([a-z_|]+)",fleet="f"}\[(\d+)ms\]', query).groups()
        start_s = now_s - float(span) / 1000
        self.asked.append((start_s, now_s))
        return web.json_response(matrix(*(self.matrix(name, start_s, now_s) for name in names.split("|"))))

    def matrix(self, name: str, start_s: float, now_s: float) -> dict:
        values = [
            [at_s, str(sample.value)]
            for at_s, samples in pushed()
            for sample in samples
            if sample.name == name and start_s < at_s <= now_s
        ]
        return {"metric": {"__name__": name, **self.more, **dict(LABELS)}, "values": values}


def matrix(*series: dict) -> dict:
    return {"status": "success", "data": {"resultType": "matrix", "result": list(series)}}


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
    made = Prometheus(server.url, SPAN_S, "f")
    yield made
    await made.close()


async def own_series(now_s: float) -> Mapping[str, Sequence[Series]]:
    window = Window(SPAN_S)
    for at_s, samples in pushed():
        if at_s <= now_s:
            window.add(at_s, samples)
    return await window.series(NAMES, now_s)


async def test_both_give_identical_series(prometheus: Prometheus):
    own, theirs = await own_series(NOW_S), await prometheus.series(NAMES, NOW_S)
    assert own == theirs
    assert own[NAMES[0]][0].times_s[0] == NOW_S - SPAN_S
    assert len(own[NAMES[0]][0].times_s) == 13


async def test_only_what_may_be_new_is_read_again(server: Server, prometheus: Prometheus):
    for now_s in (NOW_S - 10, NOW_S - 9, NOW_S):
        own, theirs = await own_series(now_s), await prometheus.series(NAMES, now_s)
        assert own == theirs
    assert max(end_s - start_s for start_s, end_s in server.asked) <= module.SLICE_S + 0.01
    assert server.asked[-1][0] == pytest.approx(NOW_S - 9 - module.LATE_S, abs=0.01)


async def test_reading_goes_on_where_it_failed(server: Server, prometheus: Prometheus):
    async def once_then_never(query: str, now_s: float) -> web.StreamResponse:
        server.answer = says(b"", 503)
        return await server.from_samples(query, now_s)

    server.answer = once_then_never
    with pytest.raises(Unreachable, match="status 503"):
        await prometheus.series(NAMES, NOW_S)
    server.answer = server.from_samples
    assert await prometheus.series(NAMES, NOW_S) == await own_series(NOW_S)
    assert server.asked[1][0] == pytest.approx(NOW_S - SPAN_S + module.SLICE_S - module.LATE_S, abs=0.01)


async def test_a_clock_that_steps_back_reads_on(server: Server, prometheus: Prometheus):
    await prometheus.series(NAMES, NOW_S + 3600)
    theirs = await prometheus.series(NAMES, NOW_S)
    assert theirs[NAMES[0]][0].times_s[-1] == NOW_S
    assert theirs[NAMES[0]][0].times_s[0] == NOW_S - module.LATE_S


async def test_a_machine_whose_clock_is_set_reads_on_in_its_own_time(server: Server):
    ahead_s = 0.0
    source = Prometheus(server.url, SPAN_S, "f", lambda: ahead_s)
    before = await source.series(NAMES, NOW_S - 20)
    assert before[NAMES[0]][0].times_s[-1] == NOW_S - 20
    ahead_s = 15.0
    after = await source.series(NAMES, NOW_S - 15)
    assert after[NAMES[0]][0].times_s[-1] == NOW_S - 15
    assert server.asked[-1][1] == pytest.approx(NOW_S, abs=0.01)
    ahead_s += module.CLOCK_STEP_S / 2
    await source.series(NAMES, NOW_S - 15)
    assert server.asked[-1][1] == pytest.approx(NOW_S, abs=0.01)
    await source.close()


async def test_a_clock_that_is_set_back_makes_no_burst(server: Server):
    """What was scraped before bears times that come again; and the server itself takes nothing until they are over."""
    ahead_s = 0.0
    source = Prometheus(server.url, SPAN_S, "f", lambda: ahead_s)
    await source.series(NAMES, NOW_S - 20)
    ahead_s = -30.0
    for own_s in (NOW_S - 15, NOW_S - 5, NOW_S + 10, NOW_S + 20, NOW_S + 29):
        (known,) = (await source.series(NAMES, own_s))[NAMES[0]]
        assert list(known.values) == sorted(known.values)
    assert known.times_s[-1] == NOW_S + 25  # Of the server's NOW_S - 5.
    await source.close()


async def test_series_scraped_twice_count_once(server: Server, prometheus: Prometheus):
    async def twice(query: str, now_s: float) -> web.StreamResponse:
        series = [server.matrix(NAMES[0], now_s - SPAN_S, now_s) for _ in range(2)]
        series[1]["metric"]["job"] = "another"
        series[1]["values"] = [[at_s + 0.1, value] for at_s, value in series[1]["values"]]
        return web.json_response(matrix(*series))

    server.answer = twice
    (found,) = (await prometheus.series(NAMES, NOW_S))[NAMES[0]]
    assert found.labels == dict(LABELS)
    assert list(found.times_s) == sorted(set(found.times_s))


async def test_window_forgets_what_is_old_and_bounds_what_it_holds():
    window = Window(SPAN_S)
    window.add(NOW_S - 100, [Sample("old", (), 1.0)])
    window.add(NOW_S, [Sample("x", (("n", str(number)),), 1.0) for number in range(MAX_SERIES + 5)])
    assert window.refused == 6
    assert (await window.series(["old"], NOW_S))["old"] == []
    window.add(NOW_S, [Sample("x", (("n", "0"),), 2.0)])
    assert window.refused == 7


NO_COUNTS = (math.nan, math.inf, -math.inf, -1.0, 1e300)


async def test_what_is_no_count_is_left_out_by_both(server: Server, prometheus: Prometheus):
    times_s = [NOW_S - 10 + index for index in range(len(NO_COUNTS) + 2)]
    values = [1.0, *NO_COUNTS, 7.0]
    window = Window(SPAN_S)
    for at_s, value in zip(times_s, values, strict=True):
        window.add(at_s, [Sample(NAMES[0], LABELS, value)])
    series = {"metric": {"__name__": NAMES[0], **dict(LABELS)}, "values": [*zip(times_s, map(str, values), strict=True)]}
    server.answer = says(json.dumps(matrix(series)).encode())
    own, theirs = await window.series(NAMES, NOW_S), await prometheus.series(NAMES, NOW_S)
    assert own == theirs
    assert tuple(theirs[NAMES[0]][0].values) == (1.0, 7.0)
    assert window.refused == len(NO_COUNTS)


async def test_samples_out_of_order_or_out_of_range_are_left_out(server: Server, prometheus: Prometheus):
    times_s = (NOW_S - 5, NOW_S - 7, NOW_S - 3, NOW_S - 3, NOW_S + 1e6, -1.0, NOW_S - 1)
    series = {"metric": {"__name__": NAMES[0]}, "values": [(at_s, str(index)) for index, at_s in enumerate(times_s)]}
    server.answer = says(json.dumps(matrix(series)).encode())
    (found,) = (await prometheus.series(NAMES, NOW_S))[NAMES[0]]
    assert tuple(found.times_s) == (NOW_S - 5, NOW_S - 3, NOW_S - 1)
    assert tuple(found.values) == (0.0, 2.0, 6.0)


async def test_buckets_without_a_bound_and_histograms_without_samples_are_left_out(server: Server, prometheus: Prometheus):
    bounds = ({"le": "0.1"}, {"le": "+Inf"}, {"le": "nan"}, {"le": "wide"}, {})
    series = [{"metric": {"__name__": TTFT, **bound}, "values": [(NOW_S - 1, "1")]} for bound in bounds]
    native = {"metric": {"__name__": TTFT, "le": "0.5"}, "histograms": [[NOW_S, {"count": "1"}]]}
    server.answer = says(json.dumps(matrix(*series, native)).encode())
    found = (await prometheus.series([TTFT], NOW_S))[TTFT]
    assert [one.labels["le"] for one in found] == ["+Inf", "0.1"]


def says(
    body: bytes, status: int = 200, headers: dict[str, str] | None = None
) -> Callable[[str, float], Awaitable[web.StreamResponse]]:
    async def answer(query: str, now_s: float) -> web.StreamResponse:
        return web.Response(body=body, status=status, headers=headers)

    return answer


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>Welcome</html>", "status 200 and no answer of Prometheus"),
        (b"", "no answer of Prometheus"),
        (b"\xff\xfe", "no answer of Prometheus"),
        (b"[" * 100_000, "no answer of Prometheus"),
        (b'{"status": "success", "x": ' + b"[" * 100_000, "no answer of Prometheus"),
        (b"[]", "no answer of Prometheus"),
        (json.dumps({"status": "success"}).encode(), "no answer of Prometheus"),
        (json.dumps({"status": "error", "error": "query timed out"}).encode(), "refuses a query: query timed out"),
        (json.dumps({"status": "success", "data": {"resultType": "vector", "result": []}}).encode(), "with a vector"),
        (
            json.dumps({"status": "success", "data": {"resultType": "scalar", "result": [1, "1"]}}).encode(),
            "no answer of Prometheus",
        ),
        (json.dumps(matrix({"metric": {}, "values": [[NOW_S, "x"]]})).encode(), "no answer of Prometheus"),
        (json.dumps(matrix({"metric": {}, "values": [["now", "1"]]})).encode(), "no answer of Prometheus"),
        (json.dumps(matrix({"metric": {}, "values": [[1]]})).encode(), "no answer of Prometheus"),
        (json.dumps(matrix({"metric": {"model": 7}, "values": []})).encode(), "no answer of Prometheus"),
        (b'{"status":"success","data":{"resultType":"matrix","result":[{"metric":{},"values":[[1e999,"1"]]}]}}', "no answer"),
    ],
)
async def test_nonsense_is_told_as_what_it_is(server: Server, prometheus: Prometheus, body: bytes, said: str):
    server.answer = says(body)
    with pytest.raises(Unreachable, match=said):
        await prometheus.series(NAMES, NOW_S)


@pytest.mark.parametrize(
    ("status", "headers", "body", "said"),
    [
        (500, {}, b"<html>oops</html>", "status 500"),
        (404, {}, b"404 page not found", "status 404"),
        (422, {}, json.dumps({"status": "error", "error": "too many samples"}).encode(), "refuses a query: too many samples"),
        (302, {"location": "/login"}, b"", "status 302"),
        (307, {"location": "http://127.0.0.1:1/api/v1/query"}, b"", "status 307"),
        (200, {"content-encoding": "gzip"}, b"this is no gzip", "does not answer"),
    ],
)
async def test_what_is_no_good_answer_is_told(server: Server, prometheus: Prometheus, status, headers, body, said):
    server.answer = says(body, status, headers)
    with pytest.raises(Unreachable, match=said):
        await prometheus.series(NAMES, NOW_S)


async def test_answer_beyond_its_bounds_is_not_taken(server: Server, prometheus: Prometheus, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 100_000)
    server.answer = says(b" " * 1_000_000)
    with pytest.raises(Unreachable, match="more than 100000 bytes"):
        await prometheus.series(NAMES, NOW_S)
    monkeypatch.setattr(module, "MAX_SERIES", 3)
    server.answer = says(json.dumps(matrix(*({"metric": {"model": str(index)}} for index in range(4)))).encode())
    with pytest.raises(Unreachable, match="4 series, above 3"):
        await prometheus.series(NAMES, NOW_S)


async def test_server_that_is_slow_or_gone_is_unreachable(server: Server, prometheus: Prometheus, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TIMEOUT_S", 0.05)
    released = asyncio.Event()

    async def never(query: str, now_s: float) -> web.StreamResponse:
        await released.wait()
        return web.Response()

    server.answer = never
    with pytest.raises(Unreachable, match="does not answer"):
        await prometheus.series(NAMES, NOW_S)
    released.set()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://127.0.0.1:99999", "prometheus:9090", "nowhere", "file:///etc"])
async def test_url_without_a_server_is_unreachable(url: str):
    nobody = Prometheus(url, SPAN_S, "f")
    with pytest.raises(Unreachable, match="does not answer"):
        await nobody.series(NAMES, NOW_S)
    await nobody.close()
