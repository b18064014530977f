"""One request inside the engine: its tokens, its blocks, and how far their KV is computed."""

from __future__ import annotations

import numpy as np

from cluster.handoff import Token, TopLogprob
from cluster.kv import KvNamespace, block_hashes, blocks_for, next_block_hash
from cluster.request import Request
from workers.engines.detokenizer import Detokenizer
from workers.engines.engine import due_s
from workers.engines.torch_engine.attention import Span
from workers.engines.torch_engine.handover import PromptExport
from workers.engines.torch_engine.sampling import Drawn, SamplerState


class Sequence:
    """Mutable, and touched only under the engine's lock or between its steps.

    Tokens are prompt and generated ones in one list. KV of the first `computed` is in `blocks`; a step computes what is missing,
    and one that reaches the end draws the next token. Decoding is the case in which only the last token is missing.
    """

    def __init__(
        self,
        request: Request,
        *,
        attempt: int,
        order: int,
        generated: tuple[int, ...],
        namespace: KvNamespace,
        sampler: SamplerState,
        detokenizer: Detokenizer,
        now_s: float,
        export: PromptExport | None = None,
    ) -> None:
        self.request = request
        self.attempt = attempt
        self.tokens = [*request.prompt, *generated]
        self.sampler = sampler
        self.detokenizer = detokenizer
        self.export = export
        self.rank = (-request.priority, order)
        """Lower goes first, and is preempted last."""
        self.blocks: list[int] = []
        self.computed = 0
        self.shared_blocks = 0
        """Full blocks at the front that others can find, or that were found."""
        self.cached_tokens: int | None = None
        """Prompt tokens found in the prefix cache at first admission."""
        self.first_index = len(generated)
        self.queued_s = now_s
        self.due_s = due_s(request, generated, now_s)
        self.started_s: float | None = None
        self.preempted = False
        self._namespace = namespace
        self._table = np.empty(blocks_for(self.longest, namespace.block_tokens), dtype=np.int64)
        self._digests: list[int] = []

    @property
    def key(self) -> tuple[str, int]:
        return self.request.request_id, self.attempt

    @property
    def longest(self) -> int:
        """Tokens whose KV is ever needed: the last one's is not."""
        return len(self.request.prompt) + self.request.sampling.max_tokens - 1

    @property
    def generated(self) -> tuple[int, ...]:
        return tuple(self.tokens[len(self.request.prompt) :])

    @property
    def missing(self) -> int:
        """Tokens to compute before the next can be drawn, >= 1."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """It has generated something, and has the KV of all but its last token."""
        return self.missing == 1 and len(self.tokens) > len(self.request.prompt)

    def late(self, now_s: float) -> bool:
        """It has generated nothing, and nobody wants its first token any more."""
        return self.due_s <= now_s and len(self.tokens) == len(self.request.prompt)

    @property
    def digests(self) -> list[int]:
        """Prefix hashes of all full blocks."""
        size = self._namespace.block_tokens
        if not self._digests:
            self._digests = block_hashes(self.tokens, self._namespace)
        while (start := len(self._digests) * size) + size <= len(self.tokens):
            parent = self._digests[-1] if self._digests else self._namespace.root()
            self._digests.append(next_block_hash(parent, self.tokens[start : start + size]))
        return self._digests

    def take(self, blocks: list[int]) -> None:
        """Append blocks to the table."""
        end = len(self.blocks) + len(blocks)
        self._table[len(self.blocks) : end] = blocks
        self.blocks += blocks

    def drop_blocks(self) -> list[int]:
        """Forget the KV; the tokens stay, to be computed again."""
        blocks, self.blocks = self.blocks, []
        self.computed = self.shared_blocks = 0
        return blocks

    def span(self, count: int) -> Span:
        """What a step that computes the next `count` tokens needs to know of it."""
        return Span(self._table, self.computed, count)

    def append(self, drawn: Drawn, now_s: float) -> Token:
        """Take a drawn token, and say it as the client will see it."""
        index = len(self.tokens) - len(self.request.prompt)
        self.tokens.append(drawn.token_id)
        self.sampler.append(drawn.token_id)
        shown = self.detokenizer.add(drawn.token_id)
        first = index == self.first_index and self.started_s is not None
        text_of = self.detokenizer.table.text
        return Token(
            request_id=self.request.request_id,
            attempt=self.attempt,
            index=index,
            token_id=drawn.token_id,
            text=shown.text,
            token_text="" if drawn.logprob is None else shown.token_text,
            logprob=drawn.logprob,
            top_logprobs=tuple(TopLogprob(token_id=i, text=text_of(i), logprob=value) for i, value in drawn.top),
            finish=shown.finish,
            stop_reason=shown.stop_reason,
            times=(self.started_s - self.queued_s, now_s - self.started_s, 0.0) if first else None,
            cached_tokens=self.cached_tokens if first else None,
        )

    def ended(self, finish: str, *, error: str | None = None, retry: bool = False) -> Token:
        """The word that it ends without another token."""
        return Token(
            request_id=self.request.request_id,
            attempt=self.attempt,
            index=len(self.tokens) - len(self.request.prompt),
            finish=finish,
            error=error,
            retry=retry,
        )
