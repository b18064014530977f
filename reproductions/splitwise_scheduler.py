"""Splitwise's cluster-level scheduler: which machine computes a request's prompt, and which its tokens. No engine is in it.

Machines have a home, the prompt pool or the token pool. Each request goes to the prompt machine with the fewest pending tokens and
to the token machine that holds the least KV. Where the prompt queue is too long, or KV would not fit, the mixed pool is asked,
and then a machine of the other pool becomes mixed; once idle it goes home. Source: Splitwise (ISCA'24), section IV-A and -B, with
the bounds and the order of its simulator (splitwise_sim, `mixed_pool.yml`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

LONGEST_QUEUE_TOKENS = 8192  # `prompt_max_pending_batch_tokens`: four full batches.


class Placement(msgspec.Struct, frozen=True):
    """Two machines, or one twice: then no KV moves."""

    prompt: int
    token: int


class Shortest:
    """Join the shortest queue: the machine with the fewest pending tokens does all of a request. What unsplit designs do."""

    def __init__(self, machines: int) -> None:
        self.pending = [0] * machines

    def place(self, prompt: int, output: int) -> Placement:
        machine = self.pending.index(min(self.pending))
        self.pending[machine] += prompt + 1
        return Placement(machine, machine)

    def prompt_done(self, machine: int, prompt: int) -> None:
        self.pending[machine] -= prompt

    def moved(self, machine: int, prompt: int) -> None:
        raise AssertionError("nothing moves")

    def ended(self, machine: int, prompt: int, output: int) -> None:
        self.pending[machine] -= 1

    def idle(self, machine: int) -> None:
        """Nothing is there any more."""


class MixedPools:
    """The three pools. Machines are numbers: first those of the prompt pool, then those of the token pool."""

    def __init__(self, prompts: int, tokens: int, kv_tokens: float, waiting: Callable[[int], bool]) -> None:
        """kv_tokens: that a machine has room for. waiting: whether a machine has work that it has not begun."""
        self.prompt_home = prompts
        self.prompt_pool, self.token_pool = list(range(prompts)), list(range(prompts, prompts + tokens))
        self.mixed_pool: list[int] = []
        self.pending = [0] * (prompts + tokens)
        """Prompt tokens to compute, and one for each sequence that decodes or will."""
        self.held = [0] * (prompts + tokens)
        """KV tokens of all that is placed there, its whole output included, as if that were known."""
        self._kv_tokens, self._waiting = kv_tokens, waiting

    def place(self, prompt: int, output: int) -> Placement:
        kept, more = prompt + 1, output - 1
        first = self._prompt_machine(prompt)
        second = self._token_machine(kept + more)
        if first is None and self.token_pool:
            first = self._convert(self.token_pool, self.pending)
        if second is None and self.prompt_pool:
            second = self._convert(self.prompt_pool, self.held)
        if first is None or second is None:
            first = second = _least(self.prompt_pool + self.mixed_pool + self.token_pool, self.pending)
        if first != second:
            self.held[first] += kept
        self.held[second] += kept + more
        self.pending[first] += prompt
        self.pending[second] += 1
        return Placement(first, second)

    def prompt_done(self, machine: int, prompt: int) -> None:
        self.pending[machine] -= prompt

    def moved(self, machine: int, prompt: int) -> None:
        """The KV of a prompt has left the machine that computed it."""
        self.held[machine] -= prompt + 1

    def ended(self, machine: int, prompt: int, output: int) -> None:
        self.pending[machine] -= 1
        self.held[machine] -= prompt + output

    def idle(self, machine: int) -> None:
        """Nothing is there any more: one that is mixed goes home."""
        if machine in self.mixed_pool:
            self.mixed_pool.remove(machine)
            (self.prompt_pool if machine < self.prompt_home else self.token_pool).append(machine)

    def _prompt_machine(self, prompt: int) -> int | None:
        for pool in (self.prompt_pool, self.mixed_pool):
            if pool:
                machine = _least(pool, self.pending)
                if self.pending[machine] + prompt <= LONGEST_QUEUE_TOKENS or not self._waiting(machine):
                    return machine
        return None

    def _token_machine(self, kv_tokens: int) -> int | None:
        for pool in (self.token_pool, self.mixed_pool):
            if pool:
                machine = _least(pool, self.held)
                if self.held[machine] + kv_tokens < self._kv_tokens:
                    return machine
        return None

    def _convert(self, pool: list[int], by: Sequence[int]) -> int:
        machine = _least(pool, by)
        pool.remove(machine)
        self.mixed_pool.append(machine)
        return machine


def _least(machines: Sequence[int], by: Sequence[int]) -> int:
    return min(machines, key=by.__getitem__)
