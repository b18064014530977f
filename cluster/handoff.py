"""All of a running request but its KV: enough to go on elsewhere, token for token.

Sampling draws from (seed, position); penalties, stop matching and detokenising are functions of the tokens. So the state
of sampler, penalties, stops and detokeniser *is* the tokens generated so far, and the receiver rebuilds it by replaying them.
"""

from __future__ import annotations

import msgspec

from cluster.request import Request


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token_id: int
    text: str
    logprob: float


class Token(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One generated token on its way to the client, or the word that a request ended.

    `text` is what may be shown now: bytes that are not yet a character, and what may be the start of a stop string, wait for
    a later token. `token_id` is None only where a request ends without one more (abort, error).
    """

    request_id: str
    attempt: int
    index: int
    """0 is the first generated token, over all attempts."""
    token_id: int | None = None
    text: str = ""
    token_text: str = ""
    """The token alone, as logprobs show it; sent only with logprobs."""
    logprob: float | None = None
    top_logprobs: tuple[TopLogprob, ...] = ()
    finish: str | None = None
    """None while running; else "stop", "length", "abort" or "error"."""
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it; None for end of text."""
    error: str | None = None
    retry: bool = False
    """With an error: another replica may do better."""
    refused: bool = False
    """With an error: nothing was begun, since the replica takes nothing new."""
    times: tuple[float, float, float] | None = None
    """With the first token of an attempt: seconds of queue, prefill and KV transfer at the worker(s)."""
    cached_tokens: int | None = None
    """With the first token of an attempt: prompt tokens found in the prefix cache."""


class RequestState(msgspec.Struct, frozen=True, kw_only=True):
    """A running request without its KV. KV exists for the prompt and all of `generated` but the last token."""

    request: Request
    generated: tuple[int, ...]
    first: Token | None = None
    """The first token's event where the sender has not shown it to the client (after a remote prefill)."""
    transfer_params: dict[str, object] | None = None
    """Where the KV is, in the words of an engine that moves it by itself; None where it comes by blocks."""

    @property
    def kv_tokens(self) -> int:
        return len(self.request.prompt) + len(self.generated) - 1
