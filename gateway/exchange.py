"""One HTTP request that generates: its choices' tokens as they come, written as events or in one piece."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import MobulaError
from cluster.handoff import Token
from cluster.request import Request
from gateway.dispatch import Dispatcher
from gateway.generation import Generation
from gateway.openai import error_answer, usage

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Shape(Protocol):
    """How an endpoint writes tokens."""

    def opening(self, index: int) -> bytes: ...

    def token(self, index: int, token: Token) -> bytes: ...

    def usage(self, usage: dict[str, Any]) -> bytes: ...

    def whole(self, choices: list[list[Token]], usage: dict[str, Any]) -> bytes: ...


class Exchange(Response):
    """An ASGI answer. Nothing is sent before the first token, so that what fails before it has a status of its own."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        requests: list[Request],
        shape: Shape,
        http_request_id: str,
        *,
        choices_per_prompt: int,
        key_id: str | None,
        stream: bool,
        with_usage: bool,
    ) -> None:
        """Submits all of the requests, or none and raises as `Dispatcher.submit`."""
        self._dispatcher = dispatcher
        self._shape = shape
        self.background = None  # FastAPI asks for it; the rest of a Response is not used.
        self._extra = [(b"x-request-id", http_request_id.encode())]
        self._choices_per_prompt = choices_per_prompt
        self._stream = stream
        self._with_usage = with_usage
        self._woken = asyncio.Event()
        self._generations: list[Generation] = []
        try:
            for number, request in enumerate(requests):
                generation = Generation(
                    request,
                    key_id,
                    self._woken.set,
                    http_request_id=http_request_id,
                    first_choice=number % choices_per_prompt == 0,
                )
                dispatcher.submit(generation)
                self._generations.append(generation)
        except MobulaError:
            self._cancel()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.current_task()
        leaving = asyncio.create_task(self._watch(receive, answering))
        try:
            await (self._send_events(send) if self._stream else self._send_whole(send))
        except asyncio.CancelledError:
            if not leaving.done():
                raise
            answering.uncancel()
        finally:
            leaving.cancel()
            self._cancel()

    async def _watch(self, receive: Receive, answering: asyncio.Task[None]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        answering.cancel()

    async def _steps(self) -> AsyncIterator[list[tuple[int, Token]]]:
        """What came since the last step, until every choice has ended. Raises the first failure."""
        running = dict(enumerate(self._generations))
        while running:
            await self._woken.wait()
            self._woken.clear()
            ended = [index for index, generation in running.items() if generation.done]
            yield [(index, token) for index, generation in running.items() for token in generation.take()]
            for index in ended:
                failure = running.pop(index).failure
                if failure is not None:
                    raise failure

    async def _send_events(self, send: Send) -> None:
        opened = False
        try:
            async for step in self._steps():
                events = [self._shape.token(index, token) for index, token in step]
                if not opened and events:
                    opened = True
                    await self._start(send, 200, _EVENT_STREAM)
                    events = [self._shape.opening(index) for index in range(len(self._generations))] + events
                if events:
                    await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
        except MobulaError as failure:
            if not opened:
                await self._refuse(send, failure)
                return
            body = b"data: " + error_answer(failure)[1] + b"\n\n"
        else:
            body = (self._shape.usage(self._usage()) if self._with_usage else b"") + DONE
        await send({"type": "http.response.body", "body": body})

    async def _send_whole(self, send: Send) -> None:
        choices: list[list[Token]] = [[] for _ in self._generations]
        try:
            async for step in self._steps():
                for index, token in step:
                    choices[index].append(token)
        except MobulaError as failure:
            await self._refuse(send, failure)
            return
        await self._send_body(send, 200, self._shape.whole(choices, self._usage()), {})

    async def _refuse(self, send: Send, failure: MobulaError) -> None:
        await self._send_body(send, *error_answer(failure))

    async def _send_body(self, send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
        length = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self._start(send, status, length + [(name.encode(), value.encode()) for name, value in headers.items()])
        await send({"type": "http.response.body", "body": body})

    async def _start(self, send: Send, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers + self._extra})

    def _usage(self) -> dict[str, Any]:
        prompts = self._generations[:: self._choices_per_prompt]
        return usage(
            sum(len(one.request.prompt) for one in prompts),
            sum(len(one.generated) for one in self._generations),
            sum(one.cached_tokens or 0 for one in prompts),
        )

    def _cancel(self) -> None:
        for generation in self._generations:
            self._dispatcher.cancel(generation)
