"""The loop: observe, decide, write down, act; every second, and from where it was after a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from cluster.actions import Action, Decision
from cluster.snapshot import ClusterSnapshot
from controller.act.orders import Settled
from controller.journal import Entry, Journal, Outcome
from controller.memory import Memory, after, recovered
from policies.pipeline import Pipeline

log = logging.getLogger(__name__)

PERIOD_S = 1.0
MAX_OUTCOMES = 10_000  # That wait for a disk with room.


class Observer(Protocol):
    """Sees the cluster."""

    async def observe(self, memory: Memory) -> ClusterSnapshot: ...


class Actuator(Protocol):
    """Carries out. Actions are absolute: one that is under way or done already is not begun again."""

    def apply(self, number: int, actions: Sequence[Action]) -> None:
        """Begins them and returns."""

    def settle(self, snapshot: ClusterSnapshot, memory: Memory) -> Settled:
        """What has become of those begun before, and the memory with what was learnt of it."""


class Course(msgspec.Struct, frozen=True, kw_only=True):
    """How is decided, until the config says otherwise."""

    pipeline: Pipeline
    text: str
    """Stands for the pipeline in the journal."""
    mode: Literal["act", "advise"] = "act"
    challengers: Mapping[str, Pipeline] = {}


class Controller:
    """One pass a second."""

    def __init__(
        self,
        observer: Observer,
        actuator: Actuator,
        journal: Journal,
        course: Course,
        *,
        memory: Memory,
        epoch: int,
        clock: Callable[[], float],
        passed: Callable[[ClusterSnapshot, Decision, float], None] = lambda *_: None,
        period_s: float = PERIOD_S,
    ) -> None:
        """clock: seconds that never step back. epoch: above that of all before. passed: told of each pass and its seconds."""
        self.memory = memory
        self.course = course
        self.failures = self.unwritten = 0
        self._observer, self._actuator, self.journal = observer, actuator, journal
        self._epoch, self._clock, self._passed, self._period_s = epoch, clock, passed, period_s
        self._words: list[tuple[Callable[[Memory], Memory], asyncio.Future[None]]] = []
        self._heeded: list[asyncio.Future[None]] = []
        self._outcomes: tuple[Outcome, ...] = ()
        """Not in the journal yet."""

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

    async def say(self, change: Callable[[Memory], Memory]) -> None:
        """An operator's word. It counts from the next pass on; returns once that pass is written down."""
        said: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._words.append((change, said))
        await said

    async def once(self) -> Decision:
        """One pass."""
        began_s, course = self._clock(), self.course
        self._heed()
        snapshot = await self._observer.observe(self.memory)
        decision = course.pipeline.decide(snapshot)
        if decision.failed:
            self.failures += 1
            log.error("pass %d did nothing: %s", snapshot.pass_number, decision.failed)
        shadows = {name: pipeline.decide(snapshot) for name, pipeline in course.challengers.items()}
        entry = Entry(
            epoch=self._epoch, pipeline=course.text, mode=course.mode, snapshot=snapshot, decision=decision, shadows=shadows
        )
        written = self._write(entry.number, lambda: self.journal.write(entry))
        self._acknowledge()
        acts = course.mode == "act"
        settled = self._actuator.settle(snapshot, after(self.memory, snapshot, decision, applied=acts))
        self.memory = settled.memory
        self._outcomes = (*self._outcomes, *settled.outcomes)[-MAX_OUTCOMES:]
        if self._outcomes and self._write(entry.number, lambda: self.journal.add(self._outcomes)):
            self._outcomes = ()
        self.unwritten += self.journal.in_memory or bool(self._outcomes) or not written
        if acts:
            self._actuator.apply(snapshot.pass_number, decision.actions)
        self._passed(snapshot, decision, self._clock() - began_s)
        return decision

    def _heed(self) -> None:
        words, self._words = self._words, []
        for change, said in words:
            self.memory = change(self.memory)
            self._heeded.append(said)

    def _acknowledge(self) -> None:
        """What is in force is written down by now."""
        heeded, self._heeded = self._heeded, []
        for said in heeded:
            if not said.done():
                said.set_result(None)

    def _write(self, number: int, write: Callable[[], None]) -> bool:
        """The fleet is controlled on while the disk is full; only the record of it is lost, and counted."""
        try:
            write()
        except OSError as error:
            log.error("pass %d is not wholly in the journal: %s", number, error)
            return False
        return True


def recall(journal: Journal) -> Memory:
    """What the last controller knew; an empty memory for an empty journal."""
    last = journal.last()
    return Memory() if last is None else recovered(last.snapshot, last.decision, applied=last.mode == "act")
