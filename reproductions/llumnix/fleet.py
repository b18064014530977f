"""A fleet of instances under one of three schedulers, with or without live migration, priorities and scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from cluster.step_table import StepTable
from reproductions.llumnix.instances import (
    BLOCK_TOKENS,
    INSTANCES_A_NODE,
    LINK_BYTES_PER_S,
    TOKEN_BYTES,
    Seen,
    add_instance,
    look,
    memory_blocks,
)
from reproductions.llumnix.workload import Asked
from simulator.engines import Engines
from simulator.links import Links
from simulator.steps.records import DECODING, FINISHED
from simulator.timeline import Timeline

Scheduler = Literal["round robin", "load balancing", "llumnix"]
"""round robin: in turn. load balancing (the paper's INFaaS++): to the least memory, used and asked for by all that wait. llumnix:
to the greatest freeness, and live migration."""

PASS_S = 1.0
"""Between two looks for migrations and for scaling, and between two samples of fragmentation."""
MIGRATE_BELOW, MIGRATE_ABOVE = 10.0, 60.0
"""Freeness, in decode steps, of those who give and of those who take; the paper's range for scaling (section 6.5)."""
HEADROOM = 0.85
"""Of an instance's memory, that a request of high priority counts beside its own: what is left to all others keeps the batch near
the size at which decode steps are hardly longer than alone. The paper sets it from a profile (section 4.4.2)."""
LAST_STAGE_S = 0.02
"""Handshake and last stage's copy, less than a decode step, while a migrating request stalls (section 6.2: 20-30 ms)."""
STARTING_S = 15.0
"""Until a new instance serves; the weights' way from disk, an assumption that holds for all schedulers alike."""
AHEAD_BLOCKS = 2
"""Reserved beyond what a migrating request holds: for the tokens that it gets while it is copied."""


class Design(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet, and how it is run."""

    scheduler: Scheduler
    instances: int = 16
    priorities: bool = False
    """Whether high priority means anything."""
    scale_at: float | None = None
    """Scale on mean freeness below this, and above this and SCALING_SPAN; None: do not."""


SCALING_SPAN = 50.0
SCALING_WAIT_S = 10.0
"""Freeness has to be out of its range so long."""


class Ended(NamedTuple):
    """One request that has had its last token."""

    asked: Asked
    ttft_s: float
    e2e_s: float
    preemptions: int


class Instance:
    """One of them."""

    def __init__(self, engine: int, node: str, began_s: float) -> None:
        self.engine, self.node, self.began_s = engine, node, began_s
        self.requests: dict[int, None] = {}
        self.terminating = False
        self.giving = False
        """A migration from here is under way."""
        self.taking = False


class Fleet:
    """One run."""

    def __init__(self, design: Design, times: StepTable) -> None:
        self._design = design
        self._timeline, self._engines = Timeline(), Engines()
        self._links = Links(self._timeline, LINK_BYTES_PER_S)
        self._model = self._engines.model(times)
        self._instances: list[Instance] = []
        self._made = self._turn = self._coming = 0
        self._asked: dict[int, Asked] = {}
        self._out_since_s = math.inf
        self.ended: list[Ended] = []
        self.migrations = 0
        self.instance_s = 0.0
        """Of all instances, from start to end."""
        self.fragmented: list[float] = []
        """Share of all memory, every PASS_S, that is free, would serve those who head a queue, and does not as it is scattered."""
        self.computed_tokens = 0
        """Of prompts, with what was computed again after preemptions."""
        for _ in range(design.instances):
            self._start()

    def run(self, requests: Sequence[Asked]) -> None:
        """Until all are served."""
        self._timeline.at(requests[0].arrival_s, partial(self._next_arrival, requests, 0))
        self._timeline.at(PASS_S, partial(self._pass, requests))
        while len(self.ended) < len(requests):
            while not self._engines.advance(self._timeline.next_s):
                self._hear()
            self._hear()
            self._timeline.run_next()
        for instance in list(self._instances):
            self._stop(instance)

    @property
    def mean_instances(self) -> float:
        """Over the whole run, once it is over; those that start count."""
        return self.instance_s / self._timeline.now_s

    # ── instances ──

    def _start(self) -> None:
        engine = add_instance(self._engines, self._model)
        self._instances.append(Instance(engine, f"node-{self._made // INSTANCES_A_NODE}", self._timeline.now_s))
        self._made += 1

    def _stop(self, instance: Instance) -> None:
        now_s = self._timeline.now_s
        self.computed_tokens += self._engines.work(instance.engine, now_s).prompt_tokens
        self._engines.remove(instance.engine, now_s)
        self._instances.remove(instance)
        self.instance_s += now_s - instance.began_s

    def _seen(self, instances: Sequence[Instance]) -> list[Seen]:
        return look(self._engines, np.array([each.engine for each in instances], np.int32), self._timeline.now_s)

    def _freeness(self, instance: Instance, seen: Seen) -> float:
        """F = (M - sum of virtual usages) / batch (section 4.4.3), in decode steps: each takes a token of room per sequence.

        Where more is asked for than there is, what is missing is not divided: else the fullest batch would look the freest.
        """
        if instance.terminating:
            return -math.inf
        usage = seen.used + seen.head
        if self._design.priorities and any(self._asked[request].high for request in instance.requests):
            usage += HEADROOM * memory_blocks()
        room = (memory_blocks() - usage) * BLOCK_TOKENS
        return room / max(1, seen.running) if room > 0 else room

    # ── requests ──

    def _next_arrival(self, requests: Sequence[Asked], index: int) -> None:
        if index + 1 < len(requests):
            self._timeline.at(requests[index + 1].arrival_s, partial(self._next_arrival, requests, index + 1))
        asked, now_s = requests[index], self._timeline.now_s
        row = self._engines.request(
            arrival_s=now_s,
            prompt=asked.prompt,
            output=max(1, asked.output),
            priority=int(asked.high and self._design.priorities),
        )
        self._asked[row] = asked
        instance = self._choose()
        instance.requests[row] = None
        self._engines.submit(row, instance.engine, now_s, now_s)

    def _choose(self) -> Instance:
        ready = [instance for instance in self._instances if not instance.terminating]
        self._turn += 1
        if self._design.scheduler == "round robin":
            return ready[self._turn % len(ready)]
        seen = self._seen(ready)
        if self._design.scheduler == "load balancing":
            return ready[min(range(len(ready)), key=lambda index: seen[index].used + seen[index].waiting)]
        return ready[max(range(len(ready)), key=lambda index: self._freeness(ready[index], seen[index]))]

    def _hear(self) -> None:
        for said in self._engines.take_said():
            if said.kind != FINISHED:
                continue
            request, asked = self._engines.state.requests[said.request], self._asked.pop(said.request)
            first_s, last_s = float(request["first_s"]), float(request["last_s"])
            self.ended.append(Ended(asked, first_s - asked.arrival_s, last_s - asked.arrival_s, int(request["preemptions"])))
            for instance in self._instances:
                instance.requests.pop(said.request, None)
            self._engines.free(said.request)

    # ── every second ──

    def _pass(self, requests: Sequence[Asked]) -> None:
        self._timeline.after(PASS_S, partial(self._pass, requests))
        seen = self._seen(self._instances)
        if self._timeline.now_s < requests[-1].arrival_s:
            self.fragmented.append(_fragmented(seen))
        freeness = [self._freeness(*pair) for pair in zip(self._instances, seen, strict=True)]
        if self._design.scheduler == "llumnix":
            self._pair(freeness)
        if self._design.scale_at is not None:
            self._scale(seen, self._design.scale_at)

    def _pair(self, freeness: Sequence[float]) -> None:
        """The least free with the freest, the next with the next (section 4.4.3)."""
        order = sorted(range(len(freeness)), key=freeness.__getitem__)
        giving = [self._instances[index] for index in order if freeness[index] < MIGRATE_BELOW]
        taking = [self._instances[index] for index in reversed(order) if freeness[index] > MIGRATE_ABOVE]
        for source, target in zip(giving, taking, strict=False):
            if not source.giving and not target.taking:
                self._migrate(source, target)

    # ── live migration (section 4.2): all that is there is copied while it goes on; then it stalls for what came since ──

    def _migrate(self, source: Instance, target: Instance) -> None:
        now_s, requests = self._timeline.now_s, self._engines.state.requests
        self._engines.work(source.engine, now_s)  # Whole steps until now are in the books then.
        decoding = [row for row in source.requests if requests["state"][row] == DECODING]
        if not decoding:
            return
        row = min(decoding, key=lambda each: (int(requests["priority"][each]), int(requests["blocks"][each])))
        tokens = (int(requests["blocks"][row]) + AHEAD_BLOCKS) * BLOCK_TOKENS
        place = self._engines.request(arrival_s=now_s, prompt=tokens, output=1)
        if not self._engines.reserve(place, target.engine, now_s):
            self._engines.free(place)
            return
        source.giving = target.taking = True
        size = int(requests["blocks"][row]) * BLOCK_TOKENS * TOKEN_BYTES
        self._links.send(source.node, target.node, size, partial(self._copied, row, place, source, target))

    def _copied(self, row: int, place: int, source: Instance, target: Instance) -> None:
        """What was there is copied. It is over, where the request has ended, or has been preempted."""
        now_s = self._timeline.now_s
        source.giving = target.taking = False
        self._engines.take_out(place, now_s)
        self._engines.free(place)
        self._hand_over(row, source, target)
        if source in self._instances and target in self._instances:
            free_source, free_target = map(self._freeness, (source, target), self._seen((source, target)))
            if free_source < MIGRATE_BELOW and free_target > MIGRATE_ABOVE:
                self._migrate(source, target)  # A pair goes on until one of them is out of its range.

    def _hand_over(self, row: int, source: Instance, target: Instance) -> None:
        now_s, state = self._timeline.now_s, self._engines.state
        self._engines.work(source.engine, now_s)
        if row not in source.requests or state.requests["state"][row] != DECODING:
            return
        needed = int(state.requests["blocks"][row]) + 1
        if int(state.engines["kv_blocks"][target.engine] - state.engines["used"][target.engine]) < needed:
            return
        self._engines.take_out(row, now_s)
        if not self._engines.reserve(row, target.engine, now_s):
            self._engines.submit(row, source.engine, now_s, now_s)
            return
        del source.requests[row]
        target.requests[row] = None
        self.migrations += 1
        self._timeline.after(LAST_STAGE_S, partial(self._resume, row, target))

    def _resume(self, row: int, target: Instance) -> None:
        now_s = self._timeline.now_s
        if not self._engines.take_over(row, now_s):
            self._engines.take_out(row, now_s)
            self._engines.submit(row, target.engine, now_s, now_s)

    # ── scaling (section 4.4.3) ──

    def _scale(self, seen: Sequence[Seen], low: float) -> None:
        now_s = self._timeline.now_s
        serving = [pair for pair in zip(self._instances, seen, strict=True) if not pair[0].terminating]
        for instance in list(self._instances):
            if instance.terminating and not (instance.requests or instance.giving or instance.taking):
                self._stop(instance)
        mean = sum(self._freeness(*pair) for pair in serving) / len(serving)
        if low <= mean <= low + SCALING_SPAN:
            self._out_since_s = math.inf
            return
        self._out_since_s = min(self._out_since_s, now_s)
        if now_s - self._out_since_s < SCALING_WAIT_S:
            return
        self._out_since_s = math.inf
        if mean < low and len(serving) + self._coming < self._design.instances:
            self._coming += 1
            self.instance_s += STARTING_S
            self._timeline.after(STARTING_S, self._started)
        elif mean > low + SCALING_SPAN and len(serving) > 1:
            least = min(serving, key=lambda pair: pair[1].running)
            least[0].terminating = True

    def _started(self) -> None:
        self._coming -= 1
        self._start()


def _fragmented(seen: Sequence[Seen]) -> float:
    """Demands of those who head a queue, smallest first, that all free memory together would serve, as a share of all memory."""
    free, served = sum(each.free for each in seen), 0.0
    for head in sorted(each.head for each in seen if each.head > each.free):
        if head <= free - served:
            served += head
    return served / (memory_blocks() * len(seen))
