"""The same raw samples from a Prometheus server: instant queries of range vectors, which answer with what was scraped.

What was read is kept in a window as pushed samples are, so that a read asks only for what may be new, and whatever the server
answers goes through the one door.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import aiohttp
import msgspec

from cluster.errors import Unreachable
from cluster.metrics import GATEWAY_METRICS
from controller.observe.counters import Series
from controller.observe.window import MAX_SERIES, Labels, Window

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0  # Of one query. What was known stays in force, and ages.
SLICE_S = 30.0  # Asked for at once: of as many series as a window holds that is some 16 MB.
CLOCK_STEP_S = 1.0  # Less is drift, which no bucket shows.
LATE_S = 15.0  # Samples bear the time at which their scrape began and come when it has ended: 10 s later at most, by default.
MAX_ANSWER_BYTES = 32 * 2**20
OWN_LABELS = frozenset({"instance", "le"}.union(*(metric.labels for metric in GATEWAY_METRICS)))
"""Labels that tell a gateway's series apart. Prometheus adds others, as its operator likes: of the job, of the place."""


class _Matrix(msgspec.Struct):
    metric: dict[str, str]
    values: list[tuple[float, str]] = []


class _Data(msgspec.Struct):
    resultType: str
    result: list[_Matrix]


class _Status(msgspec.Struct):
    status: str
    error: str = ""


class _Answer(msgspec.Struct):
    data: _Data


class Prometheus:
    """A server by its URL, and the samples of one fleet there."""

    def __init__(self, url: str, span_s: float, fleet: str, ahead: Callable[[], float] = lambda: 0.0) -> None:
        """fleet: the label that service discovery gives to every target of the fleet.

        ahead: seconds by which this machine's clock, which is taken for the server's, is ahead of the times that `series` is given.
        """
        self._url = url.rstrip("/")
        self._span_s = span_s
        self._fleet = fleet
        self._ahead, self._ahead_s = ahead, 0.0
        self._taken_until_s, self._not_before_s = -math.inf, -math.inf
        """Of the server's time: what was read up to there, and what is known already under another time of ours."""
        self._window = Window(span_s)
        self._read_until_s = -math.inf
        self._session: aiohttp.ClientSession | None = None

    async def series(self, names: Sequence[str], now_s: float) -> Mapping[str, Sequence[Series]]:
        """Every series of each name within the span before `now_s`, in the order of their labels. Raises Unreachable."""
        self._follow_clock()
        start_s = max(now_s - self._span_s, min(self._read_until_s, now_s) - LATE_S)
        while start_s < now_s:
            end_s = min(start_s + SLICE_S, now_s)
            self._take(await self._ask(names, start_s, end_s))
            self._read_until_s = start_s = end_s
        return await self._window.series(names, now_s)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _follow_clock(self) -> None:
        """After a step back the server's times come a second time: what was read is not new, though our own time has gone on."""
        ahead_s = self._ahead()
        if abs(ahead_s - self._ahead_s) <= CLOCK_STEP_S:
            return
        log.warning("the machine's clock has been set: Prometheus is asked for %.1f s later", ahead_s)
        if ahead_s < self._ahead_s:
            self._not_before_s = self._taken_until_s
        self._ahead_s = ahead_s

    async def _ask(self, names: Sequence[str], start_s: float, end_s: float) -> list[tuple[str, Labels, list[tuple[float, float]]]]:
        """Name, labels and samples of each series. One query for all names, so that all are as of one moment."""
        start_s, end_s = start_s + self._ahead_s, end_s + self._ahead_s
        selector = f'{{__name__=~"{"|".join(names)}",fleet={json.dumps(self._fleet)}}}'
        # PromQL's range may be open at its start; a millisecond, its resolution, more makes it closed.
        parameters = {"query": f"{selector}[{round((end_s - start_s) * 1000) + 1}ms]", "time": f"{end_s:.3f}"}
        status, body = await self._post(parameters)
        try:
            said = msgspec.json.decode(body, type=_Status)
            if said.status != "success":
                raise Unreachable(f"{self._url} refuses a query: {said.error[:200] or status}")
            data = msgspec.json.decode(body, type=_Answer).data
            if data.resultType != "matrix":
                raise Unreachable(f"{self._url} answers with a {data.resultType[:40]}, not with a matrix")
            if len(data.result) > MAX_SERIES:
                raise Unreachable(f"{self._url} answers with {len(data.result)} series, above {MAX_SERIES}")
            return [read for one in data.result if (read := _read(one, start_s, end_s)) is not None]
        except (ValueError, RecursionError) as error:  # Of msgspec, of UTF-8, of a number.
            raise Unreachable(f"{self._url} answers with status {status} and no answer of Prometheus: {error}") from error

    async def _post(self, parameters: Mapping[str, str]) -> tuple[int, bytes]:
        """Status and body. A redirect is an answer like another: who reads the fleet is for the config to say."""
        self._session = self._session or aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S))
        body = bytearray()
        try:
            async with self._session.post(f"{self._url}/api/v1/query", data=parameters, allow_redirects=False) as response:
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        raise Unreachable(f"{self._url} answers with more than {MAX_ANSWER_BYTES} bytes")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(f"{self._url} does not answer: {type(error).__name__} {error}".strip()) from error
        return response.status, bytes(body)

    def _take(self, read: Iterable[tuple[str, Labels, list[tuple[float, float]]]]) -> None:
        """The window leaves out what it has, and what is no count."""
        for name, labels, samples in read:
            for at_s, value in samples:
                if at_s > self._not_before_s:
                    self._window.take(name, labels, at_s - self._ahead_s, value)
                    self._taken_until_s = max(self._taken_until_s, at_s)


def _read(matrix: _Matrix, start_s: float, end_s: float) -> tuple[str, Labels, list[tuple[float, float]]] | None:
    """None for a histogram's bucket without a bound. Raises ValueError for what is no number."""
    name = matrix.metric.get("__name__", "")
    if name.endswith("_bucket") and not _is_number(matrix.metric.get("le", "")):
        return None
    labels = tuple(sorted((key, value) for key, value in matrix.metric.items() if key in OWN_LABELS))
    # Times to the millisecond, as the server was asked.
    within = [(at_s, float(value)) for at_s, value in matrix.values if start_s - 0.001 <= at_s <= end_s + 0.001]
    return name, labels, within


def _is_number(text: str) -> bool:
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False
