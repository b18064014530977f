"""A Splitwise cluster at work: our engines as its machines, its scheduler, and KV on its way between machines.

A machine is a DGX with BLOOM-176B at TP 8 that batches as Splitwise's simulated instances do: whole prompts first come first
served, up to 2048 tokens a step, decodes in the room they leave, 512 sequences at most. KV takes a link of its own (no contention),
as in that simulator. Step times are `Tables`, either its own curve or ours fitted to the same profile.
"""

from __future__ import annotations

import csv
import functools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.measured import table_for
from cluster.piecewise import Knots, value_at
from cluster.record import TraceRow
from cluster.step_table import AFFINE_FIT, StepTable
from reproductions.splitwise_scheduler import MixedPools, Placement, Shortest
from simulator.engines import Engines, Said
from simulator.steps.records import FINISHED, FIRST_TOKEN, PREFILL_ONLY, PREFILLED, WHOLE, WHOLE_PROMPTS
from simulator.timeline import Timeline

MAX_BATCH, MAX_BATCH_TOKENS = 512, 2048  # `start_state/*.yaml`.
MIXED_FACTOR = 1.1  # A step of prompts and decodes, times one of as many prompt tokens (its performance model).
CAPPED_PROMPT = 1.3  # Prompts of an H100 capped to 70 % of its power; decodes are as without (ISCA'24, section V).
LINK_BYTES_S = 200 * 1024**3  # `mixed_pool.yml`: transfer_bandwidth 200.
KV_BYTES = 2 * 14336 * 70 * 2  # Of a token: keys and values, hidden size, layers, bytes (`bloom-176b.yaml`).
KV_TOKENS = (8 * 80 * 1024**3 - 329_000_000_000) / KV_BYTES  # What the weights leave of eight devices.
RETRY_S = 1.0  # A transfer with no room at its target is tried again so much later.
Tokens = NDArray[np.int64]
Seconds = NDArray[np.float64]
MACHINES = {"A100": "a100-80gb", "H100": "h100-80gb", "H100cap": "h100-80gb-pcap"}


class Times(msgspec.Struct, frozen=True):
    """Of all requests, in order of arrival."""

    arrival_s: NDArray[np.float64]
    prompt: NDArray[np.int64]
    output: NDArray[np.int64]
    first_s: NDArray[np.float64]
    """When the first token was there, and the last."""
    last_s: NDArray[np.float64]


class Curves:
    """Step times of each kind of machine, and of a decode step on an A100 that has one request."""

    def __init__(self, tables: Mapping[str, StepTable], alone_s: Callable[[Tokens, Tokens], Seconds]) -> None:
        """alone_s: of prompt and output tokens, the mean step."""
        self.tables, self.alone_s = tables, alone_s


@functools.cache
def published_curves(data_dir: Path) -> Curves:
    """Its simulator's: medians over the tokens of a batch, linear between and beyond (`interp1d`).

    A decode step of n sequences is looked up at n tokens, where the profile's places are prompt tokens: it hardly grows with n.
    Alone, it is looked up at the tokens of its prompt, as in `notebooks/perf_model.py`.
    """
    profiles = {machine: _medians(data_dir / "splitwise_sim/perf_model.csv", name) for machine, name in MACHINES.items()}
    decodes = profiles["A100"][1]
    tables = {machine: _published(machine, *profile) for machine, profile in profiles.items()}
    return Curves(tables, lambda prompt, output: along(decodes, prompt))


@functools.cache
def corrected_curves() -> Curves:
    """Ours, of the same profile: decodes by the sequences and KV tokens that they were measured with."""
    a100, h100 = (table_for("bloom-176b", device, 8) for device in ("a100-80g", "h100"))
    found = {"A100": a100, "H100": h100, "H100cap": h100.stretched(prefill=CAPPED_PROMPT, decode=1.0)}
    tables = {machine: msgspec.structs.replace(table, mixed_factor=MIXED_FACTOR) for machine, table in found.items()}
    one_s = a100.step_s + value_at(a100.decode, 1)
    return Curves(tables, lambda prompt, output: one_s + along(a100.kv, prompt + output / 2))


def along(knots: Knots, places: NDArray[np.float64]) -> Seconds:
    """`value_at` of many places."""
    where, there = np.array(knots).T
    piece = np.clip(np.searchsorted(where, places, side="right") - 1, 0, len(where) - 2)
    return there[piece] + (places - where[piece]) * (np.diff(there) / np.diff(where))[piece]


def _published(machine: str, prompts: Knots, decodes: Knots) -> StepTable:
    step_s = value_at(decodes, 0.0)
    return StepTable(
        step_s=step_s,
        prefill=((0.0, 0.0), (1.0, value_at(prompts, 1.0) - step_s), *_above(prompts, step_s)),
        # Larger batches than these are none.
        decode=((0.0, 0.0), *(knot for knot in _above(decodes, step_s) if knot[0] <= MAX_BATCH)),
        mixed_factor=MIXED_FACTOR,
        fit=msgspec.structs.replace(
            AFFINE_FIT, source="Splitwise's simulator", hardware=machine, model="bloom-176b", tensor_parallel=8
        ),
    )


def _medians(path: Path, hardware: str) -> tuple[Knots, Knots]:
    """(tokens of the batch, seconds) of prompts and of decode steps."""
    prompts, decodes = defaultdict(list), defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            if (row["model"], row["hardware"], row["tensor_parallel"]) == ("bloom-176b", hardware, "8"):
                tokens = int(row["prompt_size"]) * int(row["batch_size"])
                prompts[tokens].append(float(row["prompt_time"]) / 1000)
                decodes[tokens].append(float(row["token_time"]) / 1000)
    return tuple(tuple((float(at), statistics.median(found[at])) for at in sorted(found)) for found in (prompts, decodes))


def _above(knots: Knots, step_s: float) -> Knots:
    return tuple((place, value - step_s) for place, value in knots)


class Cluster:
    """One run."""

    def __init__(self, tables: Sequence[StepTable], prompts: int, tokens: int) -> None:
        """tables: of each machine. tokens: how many of them, the last, are token machines; 0 for a design that does not split."""
        self._engines, self._timeline = Engines(), Timeline()
        models = {id(table): self._engines.model(table) for table in {id(table): table for table in tables}.values()}
        self._machines = [
            self._engines.add(
                model=models[id(table)],
                kv_blocks=int(KV_TOKENS),
                block_tokens=1,
                max_running=MAX_BATCH,
                step_budget_tokens=MAX_BATCH_TOKENS,
                batching=WHOLE_PROMPTS,
            )
            for table in tables
        ]
        self._number = {engine: machine for machine, engine in enumerate(self._machines)}
        self._scheduler = MixedPools(prompts, tokens, KV_TOKENS, self._waiting) if tokens else Shortest(prompts)
        self._present = [0] * len(tables)
        """Tasks, prompts and decodes, that are at each machine."""
        self._requests: dict[int, tuple[int, Placement]] = {}

    def run(self, rows: Iterable[TraceRow]) -> Times:
        """Until all are done."""
        rows = list(rows)
        self._prompt, self._output = [row.prompt_tokens for row in rows], [row.output_tokens for row in rows]
        self._first_s, self._last_s = np.zeros(len(rows)), np.zeros(len(rows))
        for index, row in enumerate(rows):
            self._timeline.at(row.arrival_s, partial(self._arrive, index))
        while True:
            due_s = self._timeline.next_s
            done = self._engines.advance(due_s)
            for said in self._engines.take_said():
                self._hear(said)
            if done and self._timeline.next_s <= due_s:
                if due_s == np.inf:
                    break
                self._timeline.run_next()
        arrival_s = np.array([row.arrival_s for row in rows])
        return Times(arrival_s, np.array(self._prompt), np.array(self._output), self._first_s, self._last_s)

    def left(self) -> int:
        """KV tokens that machines hold, and tasks that are there: 0 once all is done."""
        return int(self._engines.state.engines["used"].sum()) + sum(self._present)

    def _waiting(self, machine: int) -> bool:
        state = self._engines.state.engines[self._machines[machine]]
        return bool(state["waiting"] or state["joining"])

    def _arrive(self, index: int) -> None:
        now_s, prompt, output = self._timeline.now_s, self._prompt[index], self._output[index]
        placed = self._scheduler.place(prompt, output)
        split = placed.prompt != placed.token
        request = self._engines.request(arrival_s=now_s, prompt=prompt, output=output, task=PREFILL_ONLY if split else WHOLE)
        self._requests[request] = index, placed
        self._present[placed.prompt] += 1 if split else 2
        self._engines.submit(request, self._machines[placed.prompt], now_s, now_s)

    def _hear(self, said: Said) -> None:
        index, placed = self._requests[said.request]
        if said.kind == FINISHED:
            self._last_s[index] = said.time_s
            self._scheduler.ended(placed.token, self._prompt[index], self._output[index])
            self._leave(placed.token)
            del self._requests[said.request]
            self._engines.free(said.request)
        elif said.kind in (FIRST_TOKEN, PREFILLED) and not self._first_s[index]:
            self._first_s[index] = said.time_s
            self._scheduler.prompt_done(placed.prompt, self._prompt[index])
            if said.kind == PREFILLED:
                moving_s = self._prompt[index] * KV_BYTES / LINK_BYTES_S
                self._timeline.at(said.time_s + moving_s, partial(self._move, said.request))
            self._leave(placed.prompt)

    def _leave(self, machine: int) -> None:
        self._present[machine] -= 1
        if not self._present[machine]:
            self._scheduler.idle(machine)

    def _move(self, request: int) -> None:
        """Its KV is at the token machine."""
        (index, placed), now_s = self._requests[request], self._timeline.now_s
        if not self._engines.reserve(request, self._machines[placed.token], now_s):
            self._timeline.after(RETRY_S, partial(self._move, request))
            return
        self._scheduler.moved(placed.prompt, self._prompt[index])
        self._present[placed.token] += 1
        assert self._engines.take_over(request, now_s), "it has just reserved its room"
