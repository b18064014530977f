"""The same raw samples from a Prometheus server: instant queries of range vectors, which answer with what was scraped."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import aiohttp
import msgspec

from cluster.errors import Unreachable
from controller.observe.counters import Series

TIMEOUT_S = 2.0  # A pass does not wait longer; what was known stays in force, and ages.
MAX_ANSWER_BYTES = 64 * 2**20
TARGET_LABELS = ("job",)
"""Prometheus' own names for what it scraped, that a process does not know of itself. `instance` tells processes apart and stays."""


class _Matrix(msgspec.Struct):
    metric: dict[str, str]
    values: list[tuple[float, str]]


class _Data(msgspec.Struct):
    resultType: str
    result: list[_Matrix]


class _Answer(msgspec.Struct):
    status: str
    data: _Data | None = None
    error: str = ""


class Prometheus:
    """A server by its URL."""

    def __init__(self, url: str, span_s: float) -> None:
        self._url = url.rstrip("/")
        self._span_s = span_s
        self._session: aiohttp.ClientSession | None = None

    async def series(self, names: Sequence[str], now_s: float) -> Mapping[str, Sequence[Series]]:
        """Every series of each name within the span before `now_s`, in the order of their labels. Raises Unreachable."""
        answers = await asyncio.gather(*(self._ask(name, now_s) for name in names))
        return dict(zip(names, answers, strict=True))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _ask(self, name: str, now_s: float) -> list[Series]:
        self._session = self._session or aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S))
        # PromQL's range is open at its start; a millisecond, its resolution, more makes it closed.
        parameters = {"query": f"{name}[{round(self._span_s * 1000) + 1}ms]", "time": f"{now_s:.3f}"}
        try:
            async with self._session.post(f"{self._url}/api/v1/query", data=parameters) as response:
                body = bytearray()
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        raise Unreachable(f"{self._url} answers about {name} with more than {MAX_ANSWER_BYTES} bytes")
            answer = msgspec.json.decode(body, type=_Answer)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(f"{self._url} does not answer about {name}: {error!r}") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unreachable(f"{self._url} answers about {name} with what is no answer of Prometheus: {error}") from error
        if answer.status != "success" or answer.data is None or answer.data.resultType != "matrix":
            raise Unreachable(f"{self._url} refuses {name}: {answer.error or 'no range vector'}")
        try:
            found = [_series(name, one) for one in answer.data.result]
        except ValueError as error:
            raise Unreachable(f"{self._url} answers about {name} with what is no number: {error}") from error
        return sorted(found, key=lambda one: sorted(one.labels.items()))


def _series(name: str, matrix: _Matrix) -> Series:
    labels = {key: value for key, value in matrix.metric.items() if key not in ("__name__", *TARGET_LABELS)}
    times_s = tuple(time_s for time_s, _ in matrix.values)
    return Series(name=name, labels=labels, times_s=times_s, values=tuple(float(value) for _, value in matrix.values))
