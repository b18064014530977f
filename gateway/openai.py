"""What OpenAI's two generation endpoints share: parameters, errors, events.

Bodies are decoded into typed structs; a field that is not in them is refused by name, and so is one that is known to OpenAI's
clients but not supported, unless it holds the value that changes nothing.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from cluster.errors import DeadlineExceeded, Draining, InvalidRequest, MobulaError, NotAllowed, Overloaded, Temporary
from cluster.request import MAX_TOP_LOGPROBS, SamplingParams

MAX_CHOICES = 128  # OpenAI's bound on n; here on prompts times n.
MAX_TOKEN_ID = 2**31 - 1
MAX_TIMEOUT_S = 3600.0
MAX_USER_CHARS = 256
MAX_SECONDS = 3600  # Of a Retry-After.
MAX_ERROR_CHARS = 1000  # An error names what it was given, which may be as long as a body.

encode = msgspec.json.encode


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted; nothing is obfuscated here."""


class Body(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of both endpoints. null is as good as absent."""

    allowed: ClassVar[Mapping[str, str]] = {}
    """By a field that takes few values: which, for an error to name."""

    model: str
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    priority: int | None = None
    slo_class: str | None = None
    timeout_s: float | None = None
    # Known to OpenAI's clients and not supported.
    logit_bias: Any = None
    metadata: Any = None
    store: Any = None


def refuse_unsupported(body: msgspec.Struct, neutral: Mapping[str, Sequence[Any]], place: str = "") -> None:
    """Raise for the first field that is set to something else than its neutral values (null is always one).

    place: where the body lies in that of the request, with its dot.
    """
    for name, values in neutral.items():
        value = getattr(body, name)
        if value is not None and value not in values:
            only = " or ".join(encode(one).decode() for one in values)
            message = f"{place}{name} {encode(value).decode()} is not supported here{only and f', only {only}'}"
            raise InvalidRequest(message, param=place + name, code="unsupported_parameter")


def decode(data: bytes, kind: type[Body]) -> Any:
    """A body, or InvalidRequest that names the field."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        field = _field(str(error))
        allowed = kind.allowed.get((field or "").rpartition(".")[2]) if "enum" in str(error) else None
        message = f"{error}, which is one of {allowed}" if allowed else str(error)
        raise InvalidRequest(message, param=field, code=_fault(str(error))) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8 at byte {_not_utf8(data)}", code="invalid_utf8") from error
    except RecursionError as error:
        raise InvalidRequest("the body nests too deeply", code="invalid_json") from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}", code="invalid_json") from error


def sampling(body: Body, *, max_tokens: int, logprobs: int | None) -> SamplingParams:
    """The body's parameters, checked. Without a seed a fresh one is drawn, so that a resumed request goes on with it."""
    given = {
        name: value
        for name in ("min_tokens", "temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "repetition_penalty")
        if (value := getattr(body, name)) is not None
    }
    if given.get("top_k") in (-1, 0):  # Other servers' word for no bound.
        del given["top_k"]
    if given.get("top_p") == 0.0:  # OpenAI's word for the most likely token alone.
        given |= {"top_p": 1.0, "top_k": 1}
    params = SamplingParams(
        max_tokens=max_tokens,
        seed=secrets.randbits(62) if body.seed is None else body.seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        **given,
    )
    params.check()
    within("n", body.n, 1, MAX_CHOICES)
    if body.timeout_s is not None and not 0.0 < body.timeout_s <= MAX_TIMEOUT_S:
        raise InvalidRequest(f"timeout_s {body.timeout_s} is outside (0, {MAX_TIMEOUT_S:.0f}]", param="timeout_s")
    for token in params.stop_token_ids:
        within("stop_token_ids", token, 0, MAX_TOKEN_ID)
    if body.user is not None and len(body.user) > MAX_USER_CHARS:
        raise InvalidRequest(f"{len(body.user)} characters above {MAX_USER_CHARS}", param="user")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options goes with stream only", param="stream_options")
    return params


def within(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise InvalidRequest(f"{name} {value} is outside [{low}, {high}]", param=name)


def top_logprobs(name: str, value: int | None) -> int | None:
    within(name, value, 0, MAX_TOP_LOGPROBS)
    return value


def error_body(message: str, kind: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """OpenAI's error shape."""
    param = param and _clipped(param)
    return encode({"error": {"message": _clipped(message), "type": kind, "param": param, "code": code}})


def error_answer(error: MobulaError) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of an error."""
    match error:
        case InvalidRequest(param=param, code=code):
            status = {"model_not_found": 404, "body_too_large": 413}.get(code, 400)
            return status, error_body(str(error), "invalid_request_error", param=param, code=code), {}
        case DeadlineExceeded():
            return 408, error_body(str(error), "timeout_error", code="deadline_exceeded"), {}
        case NotAllowed():
            body = error_body(str(error), "invalid_request_error", code="invalid_api_key")
            return 401, body, {"www-authenticate": "Bearer"}
        case Overloaded(delay_s=delay_s):
            return 429, error_body(str(error), "rate_limit_error", code="rate_limit_exceeded"), _retry_after(delay_s)
        case Temporary(delay_s=delay_s):
            code = "draining" if isinstance(error, Draining) else "unavailable"
            return 503, error_body(str(error), "server_error", code=code), _retry_after(delay_s)
        case _:
            return 500, error_body(str(error), "server_error", code="internal_error"), {}


def event(payload: Any) -> bytes:
    return b"data: " + encode(payload) + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def _retry_after(delay_s: float) -> dict[str, str]:
    return {"retry-after": str(min(MAX_SECONDS, max(1, math.ceil(delay_s))))}


def _clipped(text: str) -> str:
    return text if len(text) <= MAX_ERROR_CHARS else f"{text[:MAX_ERROR_CHARS]}..."


def _not_utf8(data: bytes) -> int:
    """Where; the decoder of JSON counts from the start of a string."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    return len(data)


def _field(message: str) -> str | None:
    """The field at fault: "stop[0]" of "- at `$.stop[0]`", "model" of "missing required field `model`"."""
    place, field = re.search(r"at `\$\.?([^`]*)`$", message), re.search(r"field `([^`]+)`", message)
    return ".".join(part[1] for part in (place, field) if part and part[1]) or None


def _fault(message: str) -> str:
    if "unknown field" in message:
        return "unknown_parameter"
    return "missing_required_parameter" if "missing required" in message else "invalid_type"
