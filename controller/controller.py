"""The loop: observe, decide, write down, act; every second, and from where it was after a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

from cluster.actions import Action, Decision
from cluster.snapshot import ClusterSnapshot
from controller.journal import Entry, Journal
from controller.memory import Memory, after, recovered
from policies.pipeline import Pipeline

log = logging.getLogger(__name__)

PERIOD_S = 1.0


class Observer(Protocol):
    """Sees the cluster."""

    async def observe(self, memory: Memory) -> ClusterSnapshot: ...


class Actuator(Protocol):
    """Carries out. Actions are absolute: one that is under way or done already is not begun again."""

    def apply(self, number: int, actions: Sequence[Action]) -> None:
        """Begins them and returns; what becomes of them is told to the journal and to the memory when it is known."""


class Controller:
    """One pass a second."""

    def __init__(
        self,
        observer: Observer,
        actuator: Actuator,
        journal: Journal,
        pipeline: Pipeline,
        *,
        text: str,
        epoch: int,
        mode: Literal["act", "advise"] = "act",
        challengers: Mapping[str, Pipeline] | None = None,
        clock: Callable[[], float],
        period_s: float = PERIOD_S,
    ) -> None:
        """text: stands for the pipeline in the journal. clock: seconds that never step back. epoch: above that of all before."""
        self.memory = recall(journal)
        self.failures = self.unwritten = 0
        self._observer, self._actuator, self._journal, self._pipeline = observer, actuator, journal, pipeline
        self._text, self._epoch, self._mode, self._clock, self._period_s = text, epoch, mode, clock, period_s
        self._challengers = challengers or {}

    async def run(self) -> None:
        """For ever. A pass that takes longer than the period delays the next; none is made up for."""
        while True:
            began_s = self._clock()
            try:
                await self.once()
            except Exception:
                self.failures += 1
                log.exception("pass %d did nothing", self.memory.pass_number)
            await asyncio.sleep(max(0.0, began_s + self._period_s - self._clock()))

    async def once(self) -> Decision:
        """One pass."""
        snapshot = await self._observer.observe(self.memory)
        decision = self._pipeline.decide(snapshot)
        if decision.failed:
            self.failures += 1
            log.error("pass %d did nothing: %s", snapshot.pass_number, decision.failed)
        shadows = {name: pipeline.decide(snapshot) for name, pipeline in self._challengers.items()}
        self._write(
            Entry(epoch=self._epoch, pipeline=self._text, mode=self._mode, snapshot=snapshot, decision=decision, shadows=shadows)
        )
        acts = self._mode == "act"
        self.memory = after(self.memory, snapshot, decision, applied=acts)
        if acts:
            self._actuator.apply(snapshot.pass_number, decision.actions)
        return decision

    def _write(self, entry: Entry) -> None:
        """The fleet is controlled on while the disk is full; only the record of it is lost, and counted."""
        try:
            self._journal.write(entry)
        except OSError as error:
            self.unwritten += 1
            log.error("pass %d is not in the journal: %s", entry.number, error)


def recall(journal: Journal) -> Memory:
    """What the last controller knew; an empty memory for an empty journal."""
    last = journal.last()
    return Memory() if last is None else recovered(last.snapshot, last.decision, applied=last.mode == "act")
