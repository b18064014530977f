"""The HTTP application: who may ask, what they ask for, and where it goes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cluster import request as wire
from cluster.errors import InvalidConfig, InvalidRequest, MobulaError, NotAllowed
from cluster.fleet import GatewaySpec, ModelSpec
from cluster.replica import Membership
from cluster.slo import Slo
from gateway.chat import ChatBody, ChatShape
from gateway.completions import CompletionBody, CompletionShape
from gateway.dispatch import Dispatcher
from gateway.exchange import Exchange, Shape
from gateway.keys import Keyring
from gateway.metrics import GatewayMetrics
from gateway.openai import MAX_CHOICES, Body, decode, error_answer, error_body, sampling, within
from gateway.request_log import RequestLog
from gateway.schema import describe, operation
from gateway.telemetry import Push, push_samples
from gateway.tokenizer import ChatTokenizer, load_tokenizer
from policies.policy import Router
from transports.transport import Transport

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
ANONYMOUS = "default"
DISCARD_RATIO = 4  # Of a body that is too large, so many times the bound is read before the connection is cut.
_JSON = "application/json"


def build_app(
    *,
    spec: GatewaySpec,
    models: Mapping[str, ModelSpec],
    membership: Callable[[], AsyncIterator[Membership]],
    transport: Transport,
    router: Router,
    slos: Mapping[str, Slo],
    gateway_id: str = "",
    address: str = "",
    push: Push | None = None,
    first_table_s: float = 0.0,
) -> FastAPI:
    """The application; `app.state.gateway` is its Gateway. Raises InvalidConfig or InvalidModel before anything starts.

    first_table_s: so long clients wait at the door until it is known who serves, rather than be told that nobody does.
    push: is told the counters every second, as the instance `address`, own host:port; None tells nobody.
    """
    gateway = Gateway(
        spec=spec,
        models=models,
        membership=membership,
        transport=transport,
        router=router,
        slos=slos,
        gateway_id=gateway_id or secrets.token_hex(8),
        address=address,
        push=push,
        first_table_s=first_table_s,
    )
    app = FastAPI(title="Mobula", version="1", lifespan=gateway.lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.gateway = gateway
    post, get = {"methods": ["POST"]}, {"methods": ["GET"]}
    app.add_api_route("/v1/chat/completions", gateway.chat, **post, openapi_extra=operation(ChatBody))
    app.add_api_route("/v1/completions", gateway.complete, **post, openapi_extra=operation(CompletionBody))
    app.add_api_route("/v1/models", gateway.list_models, **get, openapi_extra=operation())
    app.add_api_route("/v1/models/{model:path}", gateway.show_model, **get, openapi_extra=operation())
    app.add_api_route("/health", gateway.ready, **get, openapi_extra=operation(keyed=False))
    app.add_api_route("/health/live", gateway.live, **get, openapi_extra=operation(keyed=False))
    app.add_api_route("/metrics", gateway.show_metrics, **get, openapi_extra=operation(keyed=False))
    app.add_exception_handler(MobulaError, gateway.refuse)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(Exception, _apologise)
    app.add_exception_handler(ClientDisconnect, _say_nothing)
    app.openapi = describe(app, (ChatBody, CompletionBody))
    return app


class Gateway:
    """The endpoints and what they share."""

    def __init__(
        self,
        *,
        spec: GatewaySpec,
        models: Mapping[str, ModelSpec],
        membership: Callable[[], AsyncIterator[Membership]],
        transport: Transport,
        router: Router,
        slos: Mapping[str, Slo],
        gateway_id: str,
        address: str,
        push: Push | None,
        first_table_s: float,
    ) -> None:
        if (spec.keys_file is not None) == spec.allow_anonymous:
            raise InvalidConfig("gateway: give either keys_file or allow_anonymous")
        self._spec = spec
        self._metrics = GatewayMetrics(models)
        self._address, self._push, self._first_table_s = address, push, first_table_s
        self._keys = None if spec.keys_file is None else Keyring(spec.keys_file, unreadable=self._metrics.keys_unreadable)
        self._tokenizers: dict[str, ChatTokenizer] = {name: load_tokenizer(model) for name, model in models.items()}
        self._slos = slos
        self._started_s = time.time()
        self._log = None
        if spec.request_log is not None:
            self._log = RequestLog(spec.request_log, gateway_id, self._started_s, dropped=self._metrics.record_dropped)
        self._make_dispatcher = lambda: Dispatcher(
            gateway_id=gateway_id,
            membership=membership(),
            transport=transport,
            router=router,
            spec=spec,
            slos=slos,
            metrics=self._metrics,
            request_log=self._log,
        )
        self.dispatcher: Dispatcher | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.dispatcher = self._make_dispatcher()
        self.dispatcher.start()
        await self.dispatcher.first_table(self._first_table_s)
        pushing = None
        if self._push is not None:
            pushing = asyncio.create_task(push_samples(functools.partial(self._metrics.samples, self._address), self._push))
        try:
            yield
        finally:
            await self.dispatcher.close()
            if pushing is not None:
                pushing.cancel()
            if self._log is not None:
                await asyncio.to_thread(self._log.close)

    # Generation.

    async def chat(self, request: Request) -> Response:
        """Generate the assistant's next message."""
        body = await self._body(request, ChatBody)
        tokenizer = self._tokenizer(body.model)
        prompt = await tokenizer.encode(tokenizer.render([message.plain() for message in body.messages]), special=False)
        shape = functools.partial(ChatShape, token_bytes=tokenizer.token_bytes)
        return self._generate(request, body, [prompt], f"chatcmpl-{secrets.token_hex(12)}", shape)

    async def complete(self, request: Request) -> Response:
        """Go on with a text or with tokens."""
        body = await self._body(request, CompletionBody)
        tokenizer, given = self._tokenizer(body.model), body.prompts()
        _check_choices(len(given), body.n or 1)
        prompts = [await tokenizer.encode(one, special=True) if isinstance(one, str) else one for one in given]
        return self._generate(request, body, prompts, f"cmpl-{secrets.token_hex(12)}", CompletionShape)

    async def _body(self, request: Request, kind: type[Body]) -> Any:
        request.state.arrival_s = time.time()
        _check_request_id(request)
        request.state.key = self._key(request)
        body = decode(await _read(request, self._spec.max_body_bytes), kind)
        body.check()
        return body

    def _generate(
        self, request: Request, body: Any, prompts: list[list[int]], answer_id: str, shape: Callable[..., Shape]
    ) -> Response:
        context = self.dispatcher.context_tokens(body.model)
        limit, wanted = self._tokenizers[body.model].vocabulary, body.output_tokens
        for prompt in prompts:
            _check_prompt(prompt, limit, wanted, context, body.model)
        params = sampling(
            body,
            max_tokens=context - max(map(len, prompts)) if wanted is None else wanted,
            logprobs=body.alternatives,
        )
        choices, key = body.n or 1, request.state.key
        within("priority", body.priority, -wire.MAX_PRIORITY, wire.MAX_PRIORITY if key is None else key.max_priority)
        requests = [
            self._request(f"{answer_id}-{row * choices + turn}", request.state.arrival_s, body, prompt, params, turn, key)
            for row, prompt in enumerate(prompts)
            for turn in range(choices)
        ]
        with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return Exchange(
            self.dispatcher,
            requests,
            shape(answer_id, body.model, int(time.time()), logprobs=params.logprobs is not None, with_usage=with_usage),
            _request_id(request),
            choices_per_prompt=choices,
            key_id=None if key is None else key.key_id,
            stream=bool(body.stream),
            with_usage=with_usage,
        )

    def _request(
        self, request_id: str, arrival_s: float, body: Any, prompt: list[int], params: Any, turn: int, key: Any
    ) -> wire.Request:
        slo_class = body.slo_class or "default"
        if slo_class not in self._slos and slo_class != "default":
            raise InvalidRequest(f"slo_class {slo_class} is none of {', '.join(self._slos)}", param="slo_class")
        seed = params.seed + turn if params.seed + turn <= wire.MAX_SEED else turn - wire.MAX_SEED
        return wire.Request(
            request_id=request_id,
            model=body.model,
            prompt=tuple(prompt),
            sampling=params if turn == 0 else msgspec.structs.replace(params, seed=seed),
            tenant=ANONYMOUS if key is None else key.tenant,
            priority=body.priority or 0,
            slo_class=slo_class,
            arrival_s=arrival_s,
            deadline_s=None if body.timeout_s is None else arrival_s + body.timeout_s,
            salt="" if key is None else key.tenant,
        )

    # What is there, and how it is.

    async def list_models(self, request: Request) -> Response:
        """The models served here."""
        self._key(request)
        return _json({"object": "list", "data": [self._model(name) for name in self._tokenizers]}, headers=_named(request))

    async def show_model(self, request: Request, model: str) -> Response:
        """One model."""
        self._key(request)
        self._tokenizer(model)
        return _json(self._model(model), headers=_named(request))

    async def ready(self) -> Response:
        """200 while requests can be served, else 503."""
        dispatcher = self.dispatcher
        state = "draining" if dispatcher.draining else "ready" if dispatcher.ready() else "no replica is ready"
        return _json({"status": state}, 200 if state == "ready" else 503)

    async def live(self) -> Response:
        """200 while the process lives."""
        return _json({"status": "live"})

    async def show_metrics(self) -> Response:
        """Prometheus' text format."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def refuse(self, request: Request, error: Exception) -> Response:
        """An error's answer."""
        self._metrics.rejected(error)
        status, body, headers = error_answer(error)
        if status == 413:
            headers = {**headers, "connection": "close"}
        return Response(body, status, headers | _named(request), _JSON)

    def _key(self, request: Request) -> Any:
        if self._keys is None:
            return None
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not key:
            raise NotAllowed("no API key: send it as `Authorization: Bearer KEY`")
        return self._keys.check(key.strip())

    def _tokenizer(self, model: str) -> ChatTokenizer:
        tokenizer = self._tokenizers.get(model)
        if tokenizer is None:
            known = ", ".join(self._tokenizers)
            raise InvalidRequest(f"model {model} does not exist here; there is {known}", param="model", code="model_not_found")
        return tokenizer

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": int(self._started_s), "owned_by": "mobula"}


async def _read(request: Request, bound: int) -> bytes:
    """The body. One that is too large is read on for a while and dropped, as a client still sending would miss the answer."""
    data, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size <= bound:
            data += piece
        elif size > DISCARD_RATIO * bound:
            break
    if size > bound:
        raise InvalidRequest(f"the body is above {bound} bytes, the most that is read", code="body_too_large")
    return bytes(data)


def _request_id(request: Request) -> str:
    """As the client gave it, or made up."""
    if not hasattr(request.state, "request_id"):
        given = request.headers.get("x-request-id", "")
        request.state.request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
    return request.state.request_id


def _named(request: Request) -> dict[str, str]:
    """The header that names a request in its answer."""
    return {"x-request-id": _request_id(request)}


def _check_request_id(request: Request) -> None:
    if not REQUEST_ID.fullmatch(request.headers.get("x-request-id", "-")):
        raise InvalidRequest("x-request-id is not 1 to 128 visible ASCII characters", param="x-request-id")


def _check_choices(prompts: int, choices: int) -> None:
    if prompts * choices > MAX_CHOICES:
        raise InvalidRequest(f"{prompts} prompts times n {choices} is above {MAX_CHOICES}", param="n")


def _check_prompt(prompt: list[int], vocabulary: int, wanted: int | None, context: int, model: str) -> None:
    if not prompt:
        raise InvalidRequest("the prompt has no tokens", param="prompt")
    if min(prompt) < 0 or max(prompt) >= vocabulary:
        wrong = next(token for token in prompt if not 0 <= token < vocabulary)
        raise InvalidRequest(f"token id {wrong} is outside [0, {vocabulary - 1}], the vocabulary of {model}", param="prompt")
    least = 1 if wanted is None else max(1, wanted)
    if len(prompt) + least > context:
        what = f"prompt of {len(prompt)} tokens and max_tokens {least}"
        message = f"{what} make {len(prompt) + least}, above {context}, the context of {model}"
        raise InvalidRequest(message, param="max_tokens" if len(prompt) < context else "prompt", code="context_length_exceeded")


def _json(payload: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(payload), status, headers, _JSON)


async def _refuse_http(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    headers = {**(error.headers or {}), **_named(request)}
    return Response(error_body(message, "invalid_request_error", code=code), error.status_code, headers, _JSON)


async def _apologise(request: Request, error: Exception) -> Response:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return Response(error_body("the gateway failed", "server_error", code="internal_error"), 500, _named(request), _JSON)


async def _say_nothing(request: Request, error: Exception) -> Response:
    """The client left while it was sending."""
    return Response(status_code=400)
