"""How messages lie in bytes. A stream's message is a msgpack array of messages; a pull's is a header and perhaps raw KV.

A KV frame: header length (4 bytes, little-endian), header, zeros up to a multiple of 16, payload. So the payload can be viewed
as an array where it arrived.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import xxhash

from cluster.errors import ProtocolMismatch
from cluster.kv import KvLayout
from transports.messages import KV_FRAME_BYTES, FromWorker, KvChunk, KvDone, KvFailed, PullKv, ToWorker

ALIGN_BYTES = 16
WIRE_DTYPES = {"float32": "<f4", "bfloat16": "<u2", "float16": "<f2", "float8_e4m3fn": "u1"}


class KvAlive(msgspec.Struct, frozen=True, kw_only=True, tag="alive"):
    """The prefill goes on; there is nothing to send yet."""


class KvBytes(msgspec.Struct, frozen=True, kw_only=True, tag="bytes"):
    """A piece of KV and its xxh3-64. Its bytes follow, or lie at `offset` of the receiver's shared memory."""

    chunk: KvChunk
    checksum: int
    offset: int | None = None


KvHeader = KvBytes | KvAlive | KvDone | KvFailed

encode = msgspec.msgpack.Encoder().encode
_from_worker = msgspec.msgpack.Decoder(tuple[FromWorker, ...])
_to_worker = msgspec.msgpack.Decoder(tuple[ToWorker, ...])
_pull = msgspec.msgpack.Decoder(PullKv)
_header = msgspec.msgpack.Decoder(KvHeader)


def batch(encoded: Sequence[bytes]) -> bytes:
    """Messages that are already encoded, as one msgpack array."""
    return b"".join((b"\xdd", len(encoded).to_bytes(4, "big"), *encoded))


def from_worker(data: bytes) -> tuple[FromWorker, ...]:
    return _decode(_from_worker, data)


def to_worker(data: bytes) -> tuple[ToWorker, ...]:
    return _decode(_to_worker, data)


def pull_request(data: bytes) -> PullKv:
    """Also checks what the sizes of memory are computed from."""
    pull = _decode(_pull, data)
    layout = pull.layout
    if layout.dtype not in WIRE_DTYPES or min(layout.layers, layout.kv_heads, layout.head_dim) < 1:
        raise ProtocolMismatch(f"no KV lies as {layout}")
    if not 0 <= pull.skip_tokens < prompt_tokens(pull):
        raise ProtocolMismatch(f"skip_tokens {pull.skip_tokens} outside [0, {prompt_tokens(pull)}), the tokens of the prompt")
    return pull


def prompt_tokens(pull: PullKv) -> int:
    return len(pull.request.prompt) + len(pull.generated)


def kv_bytes(pull: PullKv) -> int:
    """Bytes of all the KV that a pull asks for."""
    return (prompt_tokens(pull) - pull.skip_tokens) * pull.layout.token_bytes


def frame(header: KvHeader, payload: Sequence[memoryview] = ()) -> bytes:
    head = encode(header)
    padding = bytes(-(4 + len(head)) % ALIGN_BYTES)
    return b"".join((len(head).to_bytes(4, "little"), head, padding, *payload))


def unframe(data: bytes) -> tuple[KvHeader, memoryview]:
    """The header and a view of the payload."""
    end = 4 + int.from_bytes(data[:4], "little")
    view = memoryview(data)
    return _decode(_header, view[4:end]), view[end + -end % ALIGN_BYTES :]


def pieces(chunk: KvChunk, kv: np.ndarray) -> Iterator[tuple[KvBytes, tuple[memoryview, memoryview]]]:
    """Split a chunk along its tokens into frames of at most KV_FRAME_BYTES: header, and the keys' and values' bytes."""
    if kv.ndim != 4 or kv.shape[:2] != (2, chunk.tokens):
        raise ProtocolMismatch(f"KV of shape {kv.shape} is not [2, {chunk.tokens}, kv_heads, head_dim] in layer {chunk.layer}")
    kv = np.ascontiguousarray(kv)
    step = max(1, KV_FRAME_BYTES // max(1, 2 * kv[0, :1].nbytes))
    for start in range(0, chunk.tokens, step):
        tokens = min(step, chunk.tokens - start)
        keys, values = (memoryview(half[start : start + tokens].reshape(-1).view(np.uint8)) for half in kv)
        piece = KvChunk(layer=chunk.layer, first_token=chunk.first_token + start, tokens=tokens)
        yield KvBytes(chunk=piece, checksum=checksum(keys, values)), (keys, values)


def checksum(*parts: memoryview) -> int:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()


class Arrivals:
    """What has come of a pull. Turns bytes into checked arrays and knows what is missing."""

    def __init__(self, pull: PullKv) -> None:
        self._layout = pull.layout
        self._first, self._end = pull.skip_tokens, prompt_tokens(pull)
        self._arrived = np.zeros((pull.layout.layers, self._end - self._first), dtype=bool)

    def array(self, piece: KvBytes, payload: memoryview) -> np.ndarray:
        """A view of the payload as [2, tokens, kv_heads, head_dim]. Raises ProtocolMismatch where it does not fit."""
        chunk, layout = piece.chunk, self._layout
        if not 0 <= chunk.layer < layout.layers:
            raise ProtocolMismatch(f"KV of layer {chunk.layer} outside [0, {layout.layers}), the layers of the layout")
        end = chunk.first_token + chunk.tokens
        if chunk.tokens < 1 or chunk.first_token < self._first or end > self._end:
            raise ProtocolMismatch(f"KV of tokens [{chunk.first_token}, {end}) outside [{self._first}, {self._end})")
        if len(payload) != chunk.tokens * layout.layer_token_bytes:
            raise ProtocolMismatch(f"{len(payload)} bytes for {chunk.tokens} tokens of {layout.layer_token_bytes} bytes a layer")
        if checksum(payload) != piece.checksum:
            raise ProtocolMismatch(f"checksum of layer {chunk.layer}, tokens [{chunk.first_token}, {end}) does not match")
        self._arrived[chunk.layer, chunk.first_token - self._first : end - self._first] = True
        return _view(payload, chunk.tokens, layout)

    def check_complete(self) -> None:
        missing = self._arrived.size - int(np.count_nonzero(self._arrived))
        if missing:
            raise ProtocolMismatch(f"KV ended with {missing} of {self._arrived.size} tokens' layers missing")


def _view(payload: memoryview, tokens: int, layout: KvLayout) -> np.ndarray:
    return np.frombuffer(payload, dtype=WIRE_DTYPES[layout.dtype]).reshape(2, tokens, layout.kv_heads, layout.head_dim)


def _decode(decoder: msgspec.msgpack.Decoder, data: bytes | memoryview):
    # msgspec's errors are ValueErrors, as is that for text which is not UTF-8; nesting that is too deep is a RecursionError.
    try:
        return decoder.decode(data)
    except (ValueError, RecursionError) as error:
        raise ProtocolMismatch(f"a message of {len(data)} bytes does not parse: {error}") from error
