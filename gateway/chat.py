"""`/v1/chat/completions`: its body, and its answers in whole or as events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import msgspec

from cluster.errors import InvalidRequest
from cluster.handoff import Token
from gateway.openai import Body, encode, event, refuse_unsupported, top_logprobs

MAX_MESSAGES = 4096  # Far above any conversation; bounds the template's work.

_NEUTRAL = {
    "logit_bias": ({},),
    "metadata": ({},),
    "store": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "service_tier": ("auto", "default"),
    "web_search_options": (),
    "moderation": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory", "in-memory"),
}
_NEUTRAL_IN_MESSAGE = {"tool_calls": ([],), "function_call": (), "audio": (), "annotations": ([],)}


Role = Literal["system", "developer", "user", "assistant"]


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Role
    content: str | list[TextPart] | None = None
    name: str | None = None
    # What an answer carries that a client sends back as it came.
    refusal: str | None = None
    tool_calls: Any = None
    function_call: Any = None
    audio: Any = None
    annotations: Any = None

    def check(self, place: str) -> None:
        """place: with its dot."""
        refuse_unsupported(self, _NEUTRAL_IN_MESSAGE, place)
        if self.content is None and self.refusal is None:
            raise InvalidRequest(f"{place}content is missing", param=f"{place}content", code="missing_required_parameter")

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content if isinstance(self.content, list) else ()
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts) or self.refusal or ""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({} if self.name is None else {"name": self.name})


class ChatBody(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    allowed: ClassVar = {"role": ", ".join(get_args(Role)), "type": "text"}

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # Hints that change no answer. Prefixes are found and kept without them.
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # Known and not supported.
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    service_tier: Any = None
    web_search_options: Any = None
    moderation: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None

    def check(self) -> None:
        refuse_unsupported(self, _NEUTRAL)
        if not 1 <= len(self.messages) <= MAX_MESSAGES:
            raise InvalidRequest(f"{len(self.messages)} messages are outside [1, {MAX_MESSAGES}]", param="messages")
        for number, message in enumerate(self.messages):
            message.check(f"messages[{number}].")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs goes with logprobs true only", param="top_logprobs")

    @property
    def output_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        return top_logprobs("top_logprobs", self.top_logprobs or 0) if self.logprobs else None


class ChatShape:
    """Writes one request's answers."""

    def __init__(
        self,
        answer_id: str,
        model: str,
        created: int,
        *,
        logprobs: bool,
        with_usage: bool,
        token_bytes: Callable[[int, str], bytes],
    ) -> None:
        """token_bytes: of a token's id and text."""
        self._token_bytes = token_bytes
        self._id = {"id": answer_id}
        self._about = {"created": created, "model": model}
        self._logprobs = logprobs
        self._usage = {"usage": None} if with_usage else {}
        start = encode({**self._id, "object": "chat.completion.chunk", **self._about, **self._usage})[:-1]
        self._start = b"data: " + start + b',"choices":[{"index":'

    def opening(self, index: int) -> bytes:
        """The event that names the role."""
        delta = b'%b%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        return delta % (self._start, index)

    def token(self, index: int, token: Token) -> bytes:
        """A token's event, and after the last one that of the finish."""
        written = b""
        if token.token_id is not None or token.text:
            logprobs = encode({"content": [self._logprob(token)], "refusal": None}) if self._logprobs else b"null"
            delta = b'%b%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":null}]}\n\n'
            written = delta % (self._start, index, encode(token.text), logprobs)
        if token.finish is not None:
            written += b'%b%d,"delta":{},"logprobs":null,"finish_reason":%b}]}\n\n' % (self._start, index, encode(token.finish))
        return written

    def usage(self, usage: dict[str, Any]) -> bytes:
        return event({**self._id, "object": "chat.completion.chunk", **self._about, "choices": [], "usage": usage})

    def whole(self, choices: list[list[Token]], usage: dict[str, Any]) -> bytes:
        answers = [self._choice(*one) for one in enumerate(choices)]
        return encode({**self._id, "object": "chat.completion", **self._about, "choices": answers, "usage": usage})

    def _choice(self, index: int, tokens: list[Token]) -> dict[str, Any]:
        logprobs = [self._logprob(token) for token in tokens if token.token_id is not None]
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(token.text for token in tokens), "refusal": None},
            "logprobs": {"content": logprobs, "refusal": None} if self._logprobs else None,
            "finish_reason": tokens[-1].finish,
        }

    def _logprob(self, token: Token) -> dict[str, Any]:
        tops = [self._one(top.token_id, top.text, top.logprob) for top in token.top_logprobs]
        return self._one(token.token_id, token.token_text, token.logprob) | {"top_logprobs": tops}

    def _one(self, token_id: int, text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(self._token_bytes(token_id, text))}
