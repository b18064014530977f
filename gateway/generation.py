"""One generation from its acceptance to its last token: what the gateway must remember to go on elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from cluster.errors import MobulaError
from cluster.handoff import Token
from cluster.kv import KvNamespace
from cluster.request import Request
from cluster.slo import RequestTiming
from policies.route import Ask, Route


class Generation:
    """One choice of one HTTP request.

    `fresh` holds tokens not yet written to the client, each index once whatever the number of attempts. `wake` is called when
    something was added to it, or when the generation ended: then `done` is set, and `failure` says why if it failed.
    """

    __slots__ = (
        "ask",
        "attempt",
        "block_hashes",
        "cached_tokens",
        "done",
        "excluded",
        "failure",
        "first_choice",
        "first_s",
        "fresh",
        "generated",
        "http_request_id",
        "key_id",
        "last_s",
        "namespace",
        "queued_s",
        "request",
        "route",
        "sent_s",
        "sent_tokens",
        "times",
        "tried",
        "vain",
        "wake",
        "worker_id",
    )

    def __init__(
        self,
        request: Request,
        key_id: str | None,
        wake: Callable[[], None],
        *,
        http_request_id: str = "",
        first_choice: bool = True,
    ) -> None:
        """first_choice: of its prompt; the others share it, and the prompt is charged to the key once."""
        self.request = request
        self.key_id = key_id
        self.http_request_id = http_request_id
        self.first_choice = first_choice
        self.wake = wake
        self.generated: list[int] = []
        self.fresh: list[Token] = []
        self.attempt = -1
        """Of the copy whose tokens count; -1 before the first was sent."""
        self.ask: Ask | None = None
        self.namespace = KvNamespace(model=request.model)
        """In which its blocks are hashed; the same for all its attempts."""
        self.block_hashes: tuple[int, ...] = ()
        """Of the prompt."""
        self.route: Route | None = None
        self.worker_id = ""
        """Of the worker that decodes it now; empty while it waits."""
        self.tried: list[str] = []
        self.vain = 0
        """Attempts that failed since one gave a token, that one included."""
        self.excluded: frozenset[str] = frozenset()
        self.done = False
        self.failure: MobulaError | None = None
        self.queued_s = request.arrival_s
        self.sent_s: float | None = None
        self.sent_tokens = 0
        """Generated when the present attempt began."""
        self.first_s: float | None = None
        self.last_s: float | None = None
        self.times: tuple[float, float, float] | None = None
        """Of the attempt that gave the first token, as are `sent_s` and `cached_tokens`."""
        self.cached_tokens: int | None = None

    def take(self) -> list[Token]:
        """What came since the last call."""
        tokens, self.fresh = self.fresh, []
        return tokens

    @property
    def timing(self) -> RequestTiming:
        """What the client saw of it."""
        return RequestTiming(
            arrival_s=self.request.arrival_s,
            first_token_s=self.first_s,
            last_token_s=self.last_s,
            output_tokens=len(self.generated),
            error=None if self.failure is None else str(self.failure),
        )

    @property
    def queue_s(self) -> float | None:
        """Wait before its prompt was computed, here, in vain attempts and at the replica; None while it has not been."""
        if self.sent_s is None or self.times is None:
            return None
        return self.sent_s - self.request.arrival_s + self.times[0]

    @property
    def decode_s(self) -> float | None:
        """First to last token."""
        return None if self.first_s is None else self.last_s - self.first_s
