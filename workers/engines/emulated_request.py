"""One request inside the emulated engine, and the tokens it makes up."""

from __future__ import annotations

from functools import lru_cache

import msgspec
import numpy as np
import xxhash
from tokenizers import Tokenizer, decoders, models

from cluster.errors import InvalidModel
from cluster.handoff import RequestState, Token
from cluster.kv import KvNamespace, block_hashes, next_block_hash
from cluster.request import Request
from workers.engines.detokenizer import MAX_TOKENIZERS, Detokenizer, token_table
from workers.engines.emulated_kv import Sender
from workers.engines.engine import Submission, due_s

DRAWN_AHEAD = 64  # Tokens drawn at once: one call of numpy instead of 64.


class Vocabulary:
    """Which tokens may be drawn, and how they read.

    Without a tokenizer.json token 17 reads " 17". Special tokens are never drawn: they could end a text.
    """

    def __init__(self, size: int, tokenizer_path: str | None) -> None:
        self.tokenizer = _tokenizer(tokenizer_path) if tokenizer_path else _numbers(size)
        self.size = max(size, token_table(self.tokenizer).size)
        self.drawable = _drawable(self.tokenizer)


class Sequence:
    """One request inside the engine. Touched only under its lock."""

    def __init__(
        self, submission: Submission, *, namespace: KvNamespace, vocabulary: Vocabulary, now_s: float, sender: Sender | None = None
    ) -> None:
        request = submission.request
        self.request = request
        self.key = (request.request_id, submission.attempt)
        self.rank = (-request.priority, 0)
        """Lower goes first, and is preempted last."""
        self.prompt_tokens = len(request.prompt)
        self.tokens = [*request.prompt, *submission.generated]
        self.computed = 0
        """Tokens at the front whose KV is here."""
        self.blocks: list[int] = []
        self.held_tokens = 0
        """Tokens that the blocks have room for."""
        self.shared_blocks = 0
        """Full blocks at the front that others can find, or that were found."""
        self.sender = sender
        """Where its KV goes, if it is decoded elsewhere."""
        self.detokenizer = Detokenizer(vocabulary.tokenizer, request.sampling, frozenset(), submission.generated)
        self.queued_s = now_s
        self.due_s = due_s(request, submission.generated, now_s)
        self.started_s: float | None = None
        self.cached_tokens: int | None = None
        self.first_said = False
        self.preempted = False
        self.removed = False
        self._root = namespace.root()
        self._size = namespace.block_tokens
        self._hashes = block_hashes(self.tokens, namespace)
        self._vocabulary = vocabulary
        self._draw_key = _draw_key(request)
        self._drawn: list[int] = []
        self._drawn_first = 0

    def hashes_of(self, blocks: int) -> list[int]:
        """Of the first so many full blocks."""
        hashes, size = self._hashes, self._size
        while len(hashes) < blocks:
            start = len(hashes) * size
            hashes.append(next_block_hash(hashes[-1] if hashes else self._root, self.tokens[start : start + size]))
        return hashes if len(hashes) == blocks else hashes[:blocks]

    @property
    def generated(self) -> tuple[int, ...]:
        return tuple(self.tokens[self.prompt_tokens :])

    def next_token(self) -> Token:
        """The next token as the client will see it; the sequence has it then."""
        index = len(self.tokens) - self.prompt_tokens
        place = index - self._drawn_first
        if place >= len(self._drawn):
            self._drawn, self._drawn_first, place = _draw(self._draw_key, index, self._vocabulary.drawable), index, 0
        token_id = self._drawn[place]
        self.tokens.append(token_id)
        text, _, finish, stop_reason = self.detokenizer.add(token_id)
        request_id, attempt = self.key
        return Token(
            request_id=request_id,
            attempt=attempt,
            index=index,
            token_id=token_id,
            text=text,
            finish=finish,
            stop_reason=stop_reason,
        )

    def late(self, now_s: float) -> bool:
        """It has generated nothing, and nobody wants its first token any more."""
        return self.due_s <= now_s and len(self.tokens) == self.prompt_tokens

    def ended(self, finish: str, *, error: str | None, retry: bool) -> Token:
        """The word that it ends without another token."""
        request_id, attempt = self.key
        index = len(self.tokens) - self.prompt_tokens
        return Token(request_id=request_id, attempt=attempt, index=index, finish=finish, error=error, retry=retry)

    def resume(self, state: RequestState, attempt: int) -> None:
        """Go on from where another engine left off; KV is here for all tokens but the last."""
        self.key = (self.request.request_id, attempt)
        self.tokens = [*state.request.prompt, *state.generated]
        self.computed = len(self.tokens) - 1
        self.detokenizer = Detokenizer(self._vocabulary.tokenizer, state.request.sampling, frozenset(), state.generated)
        self._drawn = []
        self.first_said = True

    def shown_here(self, first: Token, now_s: float) -> Token:
        """The first token with this side's attempt, and with what of the wait was neither queue nor prefill."""
        times = None
        if first.times is not None:
            queue_s, prefill_s, _ = first.times
            times = (queue_s, prefill_s, max(now_s - self.queued_s - queue_s - prefill_s, 0.0))
        return msgspec.structs.replace(first, attempt=self.key[1], times=times)


def rank_of(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _draw_key(request: Request) -> int:
    """Prompt and seed in 64 bits; without temperature the seed plays no part, as in a model."""
    seed = 0 if request.sampling.greedy else request.sampling.seed % 2**64
    return xxhash.xxh3_64_intdigest(np.asarray(request.prompt, dtype=np.int32).tobytes(), seed)


def _draw(key: int, first: int, ids: np.ndarray) -> list[int]:
    """Tokens, out of `ids`, of the positions from `first` on: SplitMix64 of key and position (Steele et al., OOPSLA'14)."""
    state = np.uint64(key) + np.arange(first + 1, first + 1 + DRAWN_AHEAD, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    drawn: list[int] = ids[(state ^ (state >> np.uint64(31))) % np.uint64(len(ids))].tolist()
    return drawn


@lru_cache(maxsize=MAX_TOKENIZERS)
def _drawable(tokenizer: Tokenizer) -> np.ndarray:
    """Ids that may be generated: all but special ones, which could end a text."""
    return np.array(sorted(token_table(tokenizer).shown), dtype=np.int64)


@lru_cache(maxsize=MAX_TOKENIZERS)
def _tokenizer(path: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # The library raises bare Exception for a missing and for a broken file.
        raise InvalidModel(f"{path} is no tokenizer: {error}") from None


@lru_cache(maxsize=MAX_TOKENIZERS)
def _numbers(vocabulary: int) -> Tokenizer:
    """A tokenizer whose tokens read as their numbers."""
    tokenizer = Tokenizer(models.WordLevel({f"Ġ{token_id}": token_id for token_id in range(vocabulary)}, unk_token="Ġ0"))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
