"""Tokens to text, one at a time, and the word when to stop.

All that is shown is a function of the tokens so far: replaying them elsewhere rebuilds the state.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from cluster.errors import InvalidModel
from cluster.request import SamplingParams
from cluster.token_bytes import from_byte_fallback, from_byte_level

MAX_TOKENIZERS = 8  # Token tables kept: one a model in this process, with room; a table of 150,000 tokens takes about 20 MB.


class Shown(NamedTuple):
    """What one token lets the client see."""

    text: str
    """What may be shown now: whole characters that cannot be part of a stop string."""
    token_text: str
    """The token alone."""
    finish: str | None
    """"stop" or "length" with the last token, else None."""
    stop_reason: str | int | None
    """The stop string or stop token id; None for end of text."""


class Detokenizer:
    """Text and end of one request.

    A stop string is never shown, nor is text that may turn out to begin one until it has not. The first stop string to be complete
    ends the request; of several complete at the same character, the longest. From token number `min_tokens` on, that is: an earlier
    one is text like any other.

    generated: tokens from an earlier attempt, already shown.
    """

    def __init__(
        self, tokenizer: Tokenizer, sampling: SamplingParams, eos_ids: frozenset[int], generated: Sequence[int] = ()
    ) -> None:
        self.table = token_table(tokenizer)
        self._sampling = sampling
        self._eos_ids = frozenset() if sampling.ignore_eos else eos_ids
        self._end_ids = self._eos_ids.union(sampling.stop_token_ids)
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = self.table.strip
        self._stops = StopStrings(sampling.stop) if sampling.stop else None
        self.count = 0
        for token_id in generated:
            self.add(token_id)

    def add(self, token_id: int) -> Shown:
        """Take one more token."""
        self.count += 1
        searching = self.count >= self._sampling.min_tokens
        ended = searching and token_id in self._end_ids
        last = ended or self.count >= self._sampling.max_tokens
        text = self._characters.decode(b"" if ended else self.table.shown.get(token_id, b""), last)
        if self._strip and text:
            text = text.removeprefix(self._strip)
            self._strip = ""

        stopped_by = None
        if self._stops is not None:
            text, stopped_by = self._stops.feed(text, searching)
            if last and stopped_by is None:
                text += self._stops.held
        token_text = self.table.text(token_id)
        if stopped_by is not None:
            return Shown(text, token_text, "stop", stopped_by)
        if ended:
            return Shown(text, token_text, "stop", None if token_id in self._eos_ids else token_id)
        return Shown(text, token_text, "length" if last else None, None)


class StopStrings:
    """Finds any of several strings in a text that comes in pieces: an Aho-Corasick automaton, one transition a character.

    A node is the longest end of the text that begins a stop string, so its depth is how much must be held back.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found: list[str | None] = [None]
        self._fail = [0]
        self._node = 0
        self.held = ""
        for stop in stops:
            self._insert(stop)
        self._link()

    def feed(self, text: str, searching: bool) -> tuple[str, str | None]:
        """What of the text so far may be shown now, and the stop string that ended it. Not `searching`, none ends it."""
        node = self._node
        for index, character in enumerate(text):
            node = self._step(node, character)
            found = self._found[node]
            if searching and found is not None:
                return (self.held + text[: index + 1])[: -len(found)], found
        # A whole stop string that was let pass begins nothing longer: only what may still grow is held.
        while node and not self._next[node]:
            node = self._fail[node]
        self._node = node
        pending = self.held + text
        shown = len(pending) - self._depth[node]
        self.held = pending[shown:]
        return pending[:shown], None

    def _step(self, node: int, character: str) -> int:
        while node and character not in self._next[node]:
            node = self._fail[node]
        return self._next[node].get(character, 0)

    def _insert(self, stop: str) -> None:
        node = 0
        for character in stop:
            child = self._next[node].get(character)
            if child is None:
                child = self._next[node][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[node] + 1)
                self._found.append(None)
                self._fail.append(0)
            node = child
        self._found[node] = stop

    def _link(self) -> None:
        """Point each node to its longest proper end that is a node, nearest the root first."""
        queue = list(self._next[0].values())
        for node in queue:
            for character, child in self._next[node].items():
                self._fail[child] = self._step(self._fail[node], character)
                queue.append(child)
            if self._found[node] is None:
                self._found[node] = self._found[self._fail[node]]


class TokenTable:
    """Every token's bytes, made once for a tokenizer.

    size: one above the largest token id.
    shown: by token id. Special tokens are not in it, nor are the ids with which models pad their vocabulary.
    strip: the space that the decoder takes off the front of a text, or "".
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        decoders = _decoders(tokenizer)
        kinds = [decoder["type"] for decoder in decoders]
        if "ByteLevel" in kinds:
            to_bytes = from_byte_level
        elif "ByteFallback" in kinds:
            replaced = [(each["pattern"]["String"], each["content"]) for each in decoders if each["type"] == "Replace"]
            to_bytes = partial(from_byte_fallback, replaced=replaced)
        else:
            raise InvalidModel(f"tokenizer decoder {'+'.join(kinds) or 'none'} is neither ByteLevel nor ByteFallback")
        self._special = {
            token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        vocabulary = tokenizer.get_vocab()
        self.size = 1 + max(vocabulary.values(), default=-1)
        self.shown = {token_id: to_bytes(token) for token, token_id in vocabulary.items() if token_id not in self._special}
        self.strip = next((each["content"] for each in decoders if each["type"] == "Strip" and each["start"]), "")

    def text(self, token_id: int) -> str:
        """The token alone, special ones by name."""
        return self._special.get(token_id) or self.shown.get(token_id, b"").decode("utf-8", "replace")


@lru_cache(maxsize=MAX_TOKENIZERS)
def token_table(tokenizer: Tokenizer) -> TokenTable:
    return TokenTable(tokenizer)


def _decoders(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        return []
    decoder = json.loads(tokenizer.decoder.__getstate__())
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
