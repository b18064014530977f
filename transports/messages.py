"""What is said on the wire. msgpack by msgspec: typed, bounded, no code inside."""

from __future__ import annotations

import msgspec

from cluster.handoff import RequestState, Token
from cluster.kv import KvEvent, KvLayout
from cluster.replica import Load
from cluster.request import Request

PROTOCOL_VERSION = 1

MAX_MESSAGE_BYTES = 32 * 2**20  # A million-token prompt is 5 MB; anything near this is a mistake or an attack.
WATCHER = "watcher:"
"""A peer whose id begins so asks for nothing but load reports, one a second: the controller. The epoch follows."""

KV_FRAME_BYTES = 2**20  # Large enough to amortise a message, small enough to interleave.


class PrefillSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where a decode replica pulls a prompt's KV from."""

    replica_id: str
    endpoint: str
    host_id: str = ""


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """Gateway to worker: generate."""

    replica_id: str
    request: Request
    attempt: int
    generated: tuple[int, ...] = ()
    prefill: PrefillSource | None = None
    """None: prefill where it decodes."""


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Gateway to worker: nobody wants it any more."""

    request_id: str
    attempt: int


class Resync(msgspec.Struct, frozen=True, kw_only=True, tag="resync"):
    """Gateway to worker: I missed a block event; tell me all."""

    replica_id: str


ToWorker = Submit | Abort | Resync


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """Worker to gateway: one engine step of one replica, for all of this gateway's requests in it."""

    replica_id: str
    tokens: tuple[Token, ...]


class Report(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    """Worker to gateway, every 200 ms, all its replicas at once. It is the heartbeat of the stream, too."""

    loads: tuple[Load, ...]


class BlockEvents(msgspec.Struct, frozen=True, kw_only=True, tag="blocks"):
    """Worker to gateway: what one replica's prefix cache gained and lost. `sequence` rises by one."""

    replica_id: str
    sequence: int
    events: tuple[KvEvent, ...]


FromWorker = Tokens | Report | BlockEvents


class PullKv(msgspec.Struct, frozen=True, kw_only=True):
    """Decode worker to prefill worker: compute this prompt and send its KV."""

    replica_id: str
    """The prefill replica."""
    request: Request
    attempt: int
    generated: tuple[int, ...] = ()
    """As in Submit: they are part of what is prefilled."""
    skip_tokens: int
    """The receiver already holds KV of so many tokens at the front."""
    layout: KvLayout


class KvChunk(msgspec.Struct, frozen=True, kw_only=True, tag="chunk"):
    """Header of a run of tokens' KV in one layer; the bytes follow it, C-ordered [2, tokens, kv_heads, head_dim]."""

    layer: int
    first_token: int
    tokens: int


class KvDone(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """The whole KV has been sent. `queue_s` and `prefill_s` are what it took there."""

    state: RequestState
    queue_s: float
    prefill_s: float
    cached_tokens: int


class KvFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """There will be no KV. With `retry` the receiver recomputes; without, the request itself is at fault."""

    message: str
    retry: bool
