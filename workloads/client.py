"""The open-loop client: sends each request at its time in the trace, however slow the answers are.

Latency counts from the scheduled time, so that a late client or a full window shows as latency and is not omitted.
Nothing is retried.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable

import aiohttp
import msgspec

from cluster.record import TraceRow
from cluster.slo import RequestTiming
from workloads.prompts import text_prompt, token_prompt

MAX_IN_FLIGHT = 1024  # Open sockets of one process; a usual limit on file descriptors.
MAX_EVENT_BYTES = 2**20
MAX_ERROR_CHARS = 200


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """An OpenAI endpoint and how to ask it."""

    url: str
    """Without /v1."""
    model: str
    api: str = "completions"
    """completions or chat."""
    key: str | None = None
    text: bool = False
    """Words instead of token ids; always so with chat."""
    force_length: bool = True
    """Sends ignore_eos and min_tokens, which vLLM and Mobula know, so that outputs have the trace's lengths."""
    temperature: float = 0.0
    seed: int = 0
    timeout_s: float = 300.0
    """For a whole request."""
    max_in_flight: int = MAX_IN_FLIGHT
    max_priority: int | None = None
    """The highest that the key may ask for: rows above it ask for that. None leaves them as they are."""

    def body(self, row: TraceRow, index: int) -> bytes:
        tokens = max(1, row.output_tokens)
        body: dict[str, object] = {
            "model": self.model,
            "max_tokens": tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.force_length:
            body |= {"ignore_eos": True, "min_tokens": tokens}
        if priority := row.priority if self.max_priority is None else min(row.priority, self.max_priority):
            body["priority"] = priority
        if self.api == "chat":
            body["messages"] = [{"role": "user", "content": text_prompt(row, index, seed=self.seed)}]
        else:
            prompt = text_prompt if self.text else token_prompt
            body["prompt"] = prompt(row, index, seed=self.seed)
        return msgspec.json.encode(body)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one row. `timing.error` is the kind of error, few and countable; `detail` its words."""

    row: TraceRow
    timing: RequestTiming
    """On a clock whose 0 is the start of the run."""
    send_lag_s: float
    """How much later than scheduled it was sent."""
    end_s: float
    prompt_tokens: int | None = None
    """As the server counted; None where it said nothing."""
    cached_tokens: int = 0
    detail: str = ""
    text: str = ""


class Load:
    """A run as it goes, for whoever watches it; complete once `run` returns. Of a cancelled one, what was in flight is missing."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.sent = 0
        self.in_flight = 0
        self.peak_in_flight = 0
        self.held = 0
        """Requests sent late because `max_in_flight` were open."""
        self.elapsed_s = 0.0


async def run(
    rows: Iterable[TraceRow], target: Target, load: Load | None = None, on_sample: Callable[[Sample], None] | None = None
) -> Load:
    """Replay rows, which must be in order of arrival. `load` may be given to watch it from another task."""
    load, start_s = load or Load(), time.perf_counter()
    try:
        await _send_all(rows, target, load, on_sample, start_s)
    finally:
        load.elapsed_s = time.perf_counter() - start_s
    return load


async def _send_all(
    rows: Iterable[TraceRow], target: Target, load: Load, on_sample: Callable[[Sample], None] | None, start_s: float
) -> None:
    timeout = aiohttp.ClientTimeout(total=target.timeout_s)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {target.key}"} if target.key else {})
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=headers, cookie_jar=aiohttp.DummyCookieJar()
        ) as session,
        asyncio.TaskGroup() as tasks,
    ):
        window = asyncio.Semaphore(target.max_in_flight)

        async def one(row: TraceRow, body: bytes) -> None:
            load.in_flight += 1
            load.peak_in_flight = max(load.peak_in_flight, load.in_flight)
            try:
                sample = await _Request(row, start_s).send(session, target, body)
            finally:
                load.in_flight -= 1
                window.release()
            load.samples.append(sample)
            if on_sample:
                on_sample(sample)

        for index, row in enumerate(rows):
            body = target.body(row, index)
            await asyncio.sleep(max(0.0, start_s + row.arrival_s - time.perf_counter()))
            load.held += window.locked()
            await window.acquire()
            load.sent += 1
            tasks.create_task(one(row, body))


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None
    role: str | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Error(msgspec.Struct, gc=False):
    message: str = ""


class _Event(msgspec.Struct, gc=False):
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Event).decode


class _Request:
    """One request on its way: reads the event stream and keeps the times."""

    def __init__(self, row: TraceRow, start_s: float) -> None:
        self.row = row
        self.start_s = start_s
        self.token_times_s: list[float] = []
        self.last_s: float | None = None
        self.usage: _Usage | None = None
        self.finished = False
        self.error: str | None = None
        self.detail = ""
        self.texts: list[str] = []

    async def send(self, session: aiohttp.ClientSession, target: Target, body: bytes) -> Sample:
        path = "/v1/chat/completions" if target.api == "chat" else "/v1/completions"
        sent_s = self._now_s()
        try:
            async with session.post(target.url.rstrip("/") + path, data=body) as response:
                if response.status == 200:
                    await self._read(response)
                else:
                    self.error = "rejected (429)" if response.status == 429 else f"http {response.status}"
                    self.detail = (await response.content.read(MAX_EVENT_BYTES)).decode(errors="replace")[:MAX_ERROR_CHARS]
        except TimeoutError:
            self.error, self.detail = "timeout", f"not done within {target.timeout_s:g} s"
        except aiohttp.ClientConnectorError as error:
            self.error, self.detail = "cannot connect", str(error)
        except (aiohttp.ClientError, ConnectionError) as error:
            self.error, self.detail = "disconnected", str(error) or type(error).__name__
        except msgspec.MsgspecError as error:
            self.error, self.detail = "bad event", str(error)
        return self._sample(sent_s)

    async def _read(self, response: aiohttp.ClientResponse) -> None:
        """Events end at an empty line, which may fall anywhere in what the socket gives."""
        rest = b""
        async for data in response.content.iter_any():
            now_s = self._now_s()
            *events, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in events:
                self._take(event, now_s)
            if len(rest) > MAX_EVENT_BYTES:
                self.error, self.detail = "bad event", f"longer than {MAX_EVENT_BYTES} bytes"
            if self.error:
                return
        if not self.finished:
            self.error, self.detail = "disconnected", f"the stream ended after {len(self.token_times_s)} tokens, before its end"

    def _take(self, event: bytes, now_s: float) -> None:
        if not event.startswith(b"data:"):
            event = b"\n".join(line for line in event.split(b"\n") if line.startswith(b"data:"))
        data = event[5:].strip()
        if not data:
            return
        if data == b"[DONE]":
            self.finished = True
            return
        chunk = _decode(data)
        if chunk.error:
            self.error, self.detail = "error event", chunk.error.message[:MAX_ERROR_CHARS]
        self.usage = chunk.usage or self.usage
        for choice in chunk.choices:
            text = choice.delta.content if choice.delta else choice.text
            if text or (text is not None and choice.finish_reason is None and not (choice.delta and choice.delta.role)):
                self.token_times_s.append(now_s)
                self.texts.append(text)
            if choice.finish_reason or self.token_times_s:
                self.last_s = now_s

    def _sample(self, sent_s: float) -> Sample:
        times, usage = self.token_times_s, self.usage
        first_s = times[0] if times else self.last_s
        timing = RequestTiming(
            arrival_s=self.row.arrival_s,
            first_token_s=first_s,
            last_token_s=self.last_s,
            output_tokens=usage.completion_tokens if usage else len(times),
            itl_s=tuple(later - earlier for earlier, later in itertools.pairwise(times)),
            error=self.error,
        )
        details = usage.prompt_tokens_details if usage else None
        return Sample(
            row=self.row,
            timing=timing,
            send_lag_s=max(0.0, sent_s - self.row.arrival_s),
            end_s=self._now_s(),
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
            detail=self.detail,
            text="".join(self.texts),
        )

    def _now_s(self) -> float:
        return time.perf_counter() - self.start_s
