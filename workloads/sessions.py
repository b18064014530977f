"""Conversations of many turns: each turn's prompt is all that was said before and a new message, and shares its blocks.

An open loop: a turn comes when it is drawn to come, whether or not the turn before has been answered by then.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import msgspec
import numpy as np

from cluster.record import TraceRow
from workloads import arrivals
from workloads.chance import stream
from workloads.lengths import Lengths, Waits
from workloads.population import Population
from workloads.prefixes import prompt_hashes, seeds

BATCH = 256  # Turns whose blocks are hashed at once: enough to amortise numpy's calls.


class Turn(NamedTuple):
    """Ordered by arrival, then by session."""

    arrival_s: float
    session: int
    prompt_tokens: int
    output_tokens: int


class Session(NamedTuple):
    """A conversation that has begun."""

    later: Iterator[Turn]
    """Turns to come."""
    opening: int
    """Seeds of its blocks: of the system prompt's, and of its own."""
    own: int
    sender: tuple[str, str, int]


class Sessions(msgspec.Struct, frozen=True, kw_only=True):
    """Conversations that begin as a Poisson process, from none at time 0; turns after its end are left out."""

    steps: arrivals.Steps
    """Of conversations."""
    turns: Lengths
    think: Waits
    """From a turn's arrival to the next one's: the answer, reading it, thinking and typing."""
    message: Lengths
    """What each turn adds to the prompt."""
    output: Lengths
    system_tokens: int = 0
    """Of the prompt that every conversation opens with."""
    systems: int = 1
    """Different system prompts, each as likely."""
    context_tokens: int = 131_072  # What many models take.
    """A conversation ends before a turn whose prompt and answer exceed it; a first turn is cut to fit."""
    population: Population = Population()

    @property
    def span_s(self) -> float:
        return arrivals.span_s(self.steps)

    def expected(self, until_s: float) -> None:
        """How many turns come is not known before: context and end cut conversations short."""

    def rows(self, seed: int) -> Iterator[TraceRow]:
        """The same rows for the same seed, in order of arrival. Holds the conversations that go on."""
        ordered = self._ordered(seed)
        while batch := list(islice(ordered, BATCH)):
            hashes = prompt_hashes(
                np.array([turn.prompt_tokens for turn, _ in batch]),
                np.array([session.opening for _, session in batch], dtype=np.uint64),
                np.full(len(batch), self.system_tokens),
                np.array([session.own for _, session in batch], dtype=np.uint64),
            )
            for (turn, session), block_hashes in zip(batch, hashes, strict=True):
                tenant, slo_class, priority = session.sender
                yield TraceRow(
                    arrival_s=turn.arrival_s,
                    prompt_tokens=turn.prompt_tokens,
                    output_tokens=turn.output_tokens,
                    block_hashes=block_hashes,
                    tenant=tenant,
                    slo_class=slo_class,
                    priority=priority,
                    session_id=f"session-{turn.session}",
                )

    def _ordered(self, seed: int) -> Iterator[tuple[Turn, Session]]:
        going: dict[int, Session] = {}
        waiting: list[Turn] = []
        for first, session in self._begun(seed):
            yield from self._until(first.arrival_s, waiting, going)
            going[first.session] = session
            heapq.heappush(waiting, first)
        yield from self._until(self.span_s, waiting, going)

    def _until(self, end_s: float, waiting: list[Turn], going: dict[int, Session]) -> Iterator[tuple[Turn, Session]]:
        """The turns before a time, each followed in `waiting` by its session's next."""
        while waiting and waiting[0].arrival_s < end_s:
            turn = waiting[0]
            session = going[turn.session]
            yield turn, session
            if (following := next(session.later, None)) is not None and following.arrival_s < self.span_s:
                heapq.heapreplace(waiting, following)
            else:
                heapq.heappop(waiting)
                del going[turn.session]

    def _begun(self, seed: int) -> Iterator[tuple[Turn, Session]]:
        """Each conversation's first turn and the rest of it, in order."""
        concerns = ("turns", "think", "prompts", "outputs")
        turns, think, messages, outputs = (stream(seed, concern) for concern in concerns)
        openings, chosen, own = seeds(stream(seed, "openings"), self.systems), stream(seed, "chosen"), stream(seed, "prefixes")
        senders = self.population.drawing(seed)
        number = 0
        for times_s in arrivals.arrivals(self.steps, 1.0, stream(seed, "arrivals")):
            count = len(times_s)
            lengths = self.turns.draw(turns, count)
            opened = openings[chosen.integers(self.systems, size=count)].tolist()
            roots = seeds(own, count).tolist()
            for start_s, length, opening, root, sender in zip(
                times_s.tolist(), lengths.tolist(), opened, roots, senders.next(count), strict=True
            ):
                waits_s = self.think.draw(think, length).tolist()
                said, answered = self.message.draw(messages, length).tolist(), self.output.draw(outputs, length).tolist()
                later = self._turns(number, start_s, waits_s, said, answered)
                yield next(later), Session(later, opening, root, sender)
                number += 1

    def _turns(self, number: int, start_s: float, waits_s: list[float], said: list[int], answered: list[int]) -> Iterator[Turn]:
        at_s, history = start_s, self.system_tokens
        for turn, (wait_s, message, output) in enumerate(zip(waits_s, said, answered, strict=True)):
            if turn and history + message + output > self.context_tokens:
                return
            output = min(output, self.context_tokens - 1)
            prompt = min(history + message, self.context_tokens - output)
            yield Turn(round(at_s, 6), number, prompt, output)
            at_s, history = at_s + wait_s, prompt + output
