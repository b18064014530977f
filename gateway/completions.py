"""`/v1/completions`: its body, and its answers in whole or as events."""

from __future__ import annotations

from typing import Any

from cluster.errors import InvalidRequest
from cluster.handoff import Token
from gateway.openai import Body, encode, event, refuse_unsupported, top_logprobs

OBJECT = "text_completion"
DEFAULT_MAX_TOKENS = 16  # OpenAI's.

_NEUTRAL = {"logit_bias": ({},), "metadata": ({},), "store": (False,), "suffix": ("",), "echo": (False,)}


class CompletionBody(Body, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    best_of: int | None = None
    # Known and not supported.
    suffix: Any = None
    echo: Any = None

    def check(self) -> None:
        refuse_unsupported(self, _NEUTRAL)
        if self.best_of not in (None, self.n or 1):
            message = f"best_of {self.best_of} is not supported here, only n, {self.n or 1}"
            raise InvalidRequest(message, param="best_of", code="unsupported_parameter")

    def prompts(self) -> list[str | list[int]]:
        """One or many texts or token lists."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        kinds = {type(one) for one in given}
        if len(kinds) != 1:
            raise InvalidRequest("a list of texts, of token ids or of lists of token ids, not empty, is expected", param="prompt")
        return [given] if kinds == {int} else given

    @property
    def output_tokens(self) -> int | None:
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return top_logprobs("logprobs", self.logprobs)


class CompletionShape:
    """Writes one request's answers."""

    def __init__(self, answer_id: str, model: str, created: int, *, logprobs: bool, with_usage: bool) -> None:
        self._head = {"id": answer_id, "object": OBJECT, "created": created, "model": model}
        self._logprobs = logprobs
        self._usage = {"usage": None} if with_usage else {}
        start = encode({**self._head, **self._usage})[:-1]
        self._start = b"data: " + start + b',"choices":[{"index":'
        self._chars: dict[int, int] = {}

    def opening(self, index: int) -> bytes:
        return b""

    def token(self, index: int, token: Token) -> bytes:
        logprobs = b"null"
        if self._logprobs and token.token_id is not None:
            logprobs = encode(self._logprobs_of([token], self._chars.get(index, 0)))
            self._chars[index] = self._chars.get(index, 0) + len(token.token_text)
        return b'%b%d,"text":%b,"logprobs":%b,"finish_reason":%b}]}\n\n' % (
            self._start,
            index,
            encode(token.text),
            logprobs,
            b"null" if token.finish is None else encode(token.finish),
        )

    def usage(self, usage: dict[str, Any]) -> bytes:
        return event({**self._head, "choices": [], "usage": usage})

    def whole(self, choices: list[list[Token]], usage: dict[str, Any]) -> bytes:
        return encode({**self._head, "choices": [self._choice(*one) for one in enumerate(choices)], "usage": usage})

    def _choice(self, index: int, tokens: list[Token]) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(token.text for token in tokens),
            "logprobs": self._logprobs_of(tokens, 0) if self._logprobs else None,
            "finish_reason": tokens[-1].finish,
        }

    def _logprobs_of(self, tokens: list[Token], offset: int) -> dict[str, Any]:
        drawn = [token for token in tokens if token.token_id is not None]
        offsets = []
        for token in drawn:
            offsets.append(offset)
            offset += len(token.token_text)
        return {
            "tokens": [token.token_text for token in drawn],
            "token_logprobs": [token.logprob for token in drawn],
            "top_logprobs": [_alternatives(token) for token in drawn],
            "text_offset": offsets,
        }


def _alternatives(token: Token) -> dict[str, float]:
    """The drawn token is always among them, as OpenAI says, be it one of the likeliest or not."""
    return {top.text: top.logprob for top in token.top_logprobs} | {token.token_text: token.logprob}
