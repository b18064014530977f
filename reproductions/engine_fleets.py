"""Engines alone, under jobs that are known beforehand: whole requests on each, or prompts on some and decoding on others.

What the published simulators of engines do, and no more: no gateway, no controller, no failure. A job goes to the engine of its
phase that has the least to do. Between phases its KV is *pulled*: it waits, outside of the decoding engine's memory, until there
is room for it (DistServe, OSDI'24, section 4.3), then takes the link, one job at a time. A prompt's blocks are given back where
it was computed when it is done, so the memory of prefill engines bounds nothing but what they compute at once.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.errors import InvalidConfig
from cluster.step_table import StepTable
from simulator.engines import Engines, Said
from simulator.sketch import quantiles_s
from simulator.steps.records import CHUNKED, FINISHED, ITL, PREFILL_ONLY, PREFILLED
from simulator.timeline import Timeline

BLOCK_TOKENS = 16


class Job(NamedTuple):
    """One request: when it comes, tokens of its prompt, tokens of its answer, both at least 1."""

    at_s: float
    prompt: int
    output: int


class EngineKind(msgspec.Struct, frozen=True, kw_only=True):
    """An engine as its system runs it."""

    table: StepTable
    kv_tokens: int
    """Tokens whose KV it can hold."""
    places: int = 256
    """Sequences at once."""
    budget_tokens: int = 2048
    """Tokens of a step. What it bounds depends on `batching`: see `simulator.steps.records`."""
    batching: int = CHUNKED


class Served(NamedTuple):
    """What became of each job, in their order, in seconds."""

    waited_s: NDArray[np.float64]
    """From arrival until its prompt was begun (Sarathi-Serve's scheduling delay)."""
    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    """0 for answers of one token."""
    last_s: NDArray[np.float64]
    """When it was done."""
    gaps: NDArray[np.int64]
    """A sketch of all times between two tokens; see `gap_s`."""
    tokens: int
    """Prompts and answers together."""

    def gap_s(self, share: float) -> float:
        """Quantile of the times between two tokens, to 0.5 %; 0 where no answer had two."""
        found = quantiles_s(self.gaps, (share,))
        return found[0] if found else 0.0

    def attainment(self, ttft_s: float, tpot_s: float) -> float:
        """Share of jobs within both bounds."""
        return float(np.mean((self.ttft_s <= ttft_s) & (self.tpot_s <= tpot_s)))


class EngineFleet:
    """The common part: what arrives, who is where, what engines say. Subclasses place jobs and answer what is said."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.engines = Engines()
        self.timeline = Timeline()
        self.load: dict[int, int] = {}
        """Of each engine, what `_weight` says of the jobs that it has."""
        self.rows: dict[int, int] = {}
        """Which job a row of the engines is."""
        self.started_s = np.full(len(jobs), math.nan)
        self.first_s = np.full(len(jobs), math.nan)
        self.last_s = np.full(len(jobs), math.nan)
        self.done = 0

    def add(self, kind: EngineKind, count: int = 1) -> list[int]:
        longest = max(job.prompt + job.output for job in self.jobs)
        if longest > kind.kv_tokens:
            raise InvalidConfig(f"a job has {longest} tokens, above {kind.kv_tokens}, which the engine's KV can hold")
        model = self.engines.model(kind.table)
        added = [
            self.engines.add(
                model=model,
                kv_blocks=kind.kv_tokens // BLOCK_TOKENS,
                block_tokens=BLOCK_TOKENS,
                max_running=kind.places,
                step_budget_tokens=kind.budget_tokens,
                batching=kind.batching,
            )
            for _ in range(count)
        ]
        self.load |= dict.fromkeys(added, 0)
        return added

    def every(self, seconds: float, call: Callable[[float], None]) -> None:
        """Have something called again and again, with the time, while there are jobs."""

        def again() -> None:
            if self.done < len(self.jobs):
                call(self.timeline.now_s)
                self.timeline.after(seconds, again)

        self.timeline.after(seconds, again)

    def run(self) -> Served:
        """Until all jobs are done."""
        for number, job in enumerate(self.jobs):
            self.timeline.at(job.at_s, lambda number=number: self._arrive(number))
        while True:
            until_s = self.timeline.next_s
            reached = self.engines.advance(until_s, self._react_s())
            for said in self.engines.take_said():
                self._hear(said)
            if not reached:
                continue
            if math.isinf(until_s):
                break
            self.timeline.run_next()
        assert self.done == len(self.jobs), f"{len(self.jobs) - self.done} jobs were never done"
        return self._served()

    def _served(self) -> Served:
        arrived_s = np.array([job.at_s for job in self.jobs])
        outputs = np.array([job.output for job in self.jobs])
        return Served(
            waited_s=self.started_s - arrived_s,
            ttft_s=self.first_s - arrived_s,
            tpot_s=(self.last_s - self.first_s) / np.maximum(outputs - 1, 1),
            last_s=self.last_s,
            gaps=self.engines.state.sketches[0, ITL].copy(),
            tokens=sum(job.prompt + job.output for job in self.jobs),
        )

    def _request(self, number: int, task: int = 0) -> int:
        job = self.jobs[number]
        row = self.engines.request(arrival_s=job.at_s, prompt=job.prompt, output=job.output, task=task)
        self.rows[row] = number
        return row

    def _free(self, row: int) -> None:
        del self.rows[row]
        self.engines.free(row)

    def _least(self, engines: Sequence[int]) -> int:
        return min(engines, key=self.load.__getitem__)

    def _react_s(self) -> float:
        """How long after something was said engines may go on before they are answered."""
        return math.inf

    def _arrive(self, number: int) -> None:
        raise NotImplementedError

    def _hear(self, said: Said) -> None:
        raise NotImplementedError


class Colocated(EngineFleet):
    """Alike engines that serve whole requests."""

    def __init__(self, jobs: Sequence[Job], kind: EngineKind, count: int = 1) -> None:
        super().__init__(jobs)
        self.all = self.add(kind, count)

    def _arrive(self, number: int) -> None:
        now_s, row, engine = self.timeline.now_s, self._request(number), self._least(self.all)
        self.load[engine] += self.jobs[number].prompt + self.jobs[number].output
        self.engines.submit(row, engine, now_s, now_s)

    def _hear(self, said: Said) -> None:
        if said.kind == FINISHED:
            number, record = self.rows[said.request], self.engines.state.requests[said.request]
            self.started_s[number], self.first_s[number] = record["started_s"], record["first_s"]
            self.last_s[number] = said.time_s
            self.load[said.engine] -= self.jobs[number].prompt + self.jobs[number].output
            self._free(said.request)
            self.done += 1


class Disaggregated(EngineFleet):
    """Prompts on some engines, decoding on others.

    prefill_stages: engines in a row that a prompt goes through one after the other, each with its share of the layers
    (inter-operator parallelism); `prefill.table` is that of one stage. Batches in later stages are made of those that come out
    of the one before. transfer_s: seconds for a job's KV to get to where it is decoded, from the tokens of its prompt.
    decoding False: jobs are done with their first token.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        prefill: EngineKind,
        prefills: int,
        decode: EngineKind,
        decodes: int,
        *,
        prefill_stages: int = 1,
        transfer_s: Callable[[int], float] = lambda _: 0.0,
        decoding: bool = True,
    ) -> None:
        super().__init__(jobs)
        self.lines = [self.add(prefill, prefill_stages) for _ in range(prefills)]
        self.following = {one: other for line in self.lines for one, other in itertools.pairwise(line)}
        self.decodes = self.add(decode, decodes)
        self.transfer_s, self.decoding = transfer_s, decoding
        self.line_of: dict[int, int] = {}
        """The first engine of the line that each job is in."""
        self.waiting: dict[int, deque[int]] = {engine: deque() for engine in self.decodes}
        """Rows whose KV waits for room, by engine."""
        self.link_free_s = dict.fromkeys(self.decodes, 0.0)

    def _arrive(self, number: int) -> None:
        now_s, row = self.timeline.now_s, self._request(number, PREFILL_ONLY)
        engine = self._least([line[0] for line in self.lines])
        self.line_of[number] = engine
        self.load[engine] += self.jobs[number].prompt
        self.engines.submit(row, engine, now_s, now_s)

    def _react_s(self) -> float:
        return 0.0 if any(self.waiting.values()) else math.inf

    def _hear(self, said: Said) -> None:
        if said.kind == PREFILLED:
            self._leave_stage(said)
        elif said.kind == FINISHED:
            number = self.rows[said.request]
            self.load[said.engine] -= 1
            self._free(said.request)
            self._end(number, said.time_s)
            self._pull(said.engine, said.time_s)

    def _leave_stage(self, said: Said) -> None:
        number, record = self.rows[said.request], self.engines.state.requests[said.request]
        if math.isnan(self.started_s[number]):
            self.started_s[number] = record["started_s"]
        self._free(said.request)
        following = self.following.get(said.engine)
        if following is not None:
            self.engines.submit(self._request(number, PREFILL_ONLY), following, said.time_s, said.time_s)
            return
        self.first_s[number] = said.time_s
        self.load[self.line_of.pop(number)] -= self.jobs[number].prompt
        if self.jobs[number].output == 1 or not self.decoding:
            self._end(number, said.time_s)
            return
        row = self._request(number)
        self.engines.state.requests["generated"][row] = 1
        engine = self._least(self.decodes)
        self.load[engine] += 1
        self.waiting[engine].append(row)
        self._pull(engine, said.time_s)

    def _pull(self, engine: int, now_s: float) -> None:
        """Whose KV has waited longest comes first, as many as there is room for."""
        waiting = self.waiting[engine]
        while waiting and self.engines.reserve(waiting[0], engine, now_s):
            row = waiting.popleft()
            begun_s = max(now_s, self.link_free_s[engine])
            self.link_free_s[engine] = begun_s + self.transfer_s(self.jobs[self.rows[row]].prompt)
            self.timeline.at(max(self.link_free_s[engine], self.timeline.now_s), lambda row=row: self._take_over(row))

    def _take_over(self, row: int) -> None:
        assert self.engines.take_over(row, self.timeline.now_s), "blocks were reserved for its prompt and first token"

    def _end(self, number: int, now_s: float) -> None:
        self.last_s[number] = now_s
        self.done += 1
