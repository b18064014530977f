"""Which parallelism each phase should have, and how many instances: DistServe's two placement algorithms over simulated goodput.

DistServe (OSDI'24), algorithm 1 (fast links between nodes: each phase by itself, then as many of each as the rate takes) and
algorithm 2 (slow links: pairs inside a node that share their pipeline's stages, simulated jointly, then replicated). Goodput is
found by binary search over rates, as there.

Inter-operator parallelism: a prompt passes through its stages one after the other, each a queue of its own; a decoding instance of
p stages is p batches that take turns on them, simulated as p engines that each have the whole step time and a p-th of the KV.
What that leaves out are the bubbles between unlike batches of one instance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from cluster.models import model_shape
from reproductions.capacity import highest_rate
from reproductions.distserve_steps import degrees, kv_room, step_table
from reproductions.engine_fleets import Disaggregated, EngineKind, Served
from reproductions.published_lengths import Lengths, poisson
from simulator.steps.records import WHOLE_PROMPTS

NODE_GPUS, NODES = 8, 4
"""The testbed: 4 nodes of 8 A100 (section 6.1)."""
SATURATING_TOKENS = 512
"""Of a prefill batch, beyond which it takes no further prompt: the artifact's for 13B on A100, taken for 66B as well."""
DECODING_PLACES = 256
NVLINK_BYTES_S, INFINIBAND_BYTES_S = 300e9, 100e9
"""One direction of A100's NVLink; 800 Gbit/s, the paper's example of a fast network (section 3.3)."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be served, and when it is served well."""

    data_dir: Path
    model: str
    ttft_s: float
    tpot_s: float
    lengths: Lengths
    seed: int
    prefill_cost: float = 1.0
    stages: tuple[int, ...] = (1, 2)
    """Of pipelines that are tried."""
    span_s: float = 120.0
    """Of arrivals."""
    share: float = 0.9
    """Of requests that must keep both bounds."""


class Parallelism(NamedTuple):
    """Of one instance."""

    tensor: int
    stages: int

    @property
    def gpus(self) -> int:
        return self.tensor * self.stages

    def __str__(self) -> str:
        return f"TP{self.tensor}" + (f" PP{self.stages}" if self.stages > 1 else "")


class Placement(NamedTuple):
    """So many prefill and decoding instances, with the rate that they carry together."""

    prefill: Parallelism
    prefills: int
    decode: Parallelism
    decodes: int
    goodput: float

    @property
    def gpus(self) -> int:
        return self.prefills * self.prefill.gpus + self.decodes * self.decode.gpus

    @property
    def per_gpu(self) -> float:
        return self.goodput / self.gpus

    def __str__(self) -> str:
        return f"{self.prefills} x prefill {self.prefill} and {self.decodes} x decode {self.decode} on {self.gpus} GPUs"


Alone = dict[tuple[str, Parallelism], float]
"""Goodput of one instance of a phase, the other phase taking no time."""


def alone(task: Task) -> Alone:
    """Of all instances that both algorithms choose among."""
    return {(phase, each): phase_goodput(task, phase, each) for each in feasible(task) for phase in ("prefill", "decode")}


def low_affinity(task: Task, alone: Alone) -> Placement:
    """Algorithm 2, for one unit that is then replicated: the goodput of a replica is what counts per GPU.

    A pair can carry no more than either of its phases alone, so pairs are tried from the most promising on, until none left can
    be the best.
    """
    pairs = [
        (min(alone["prefill", p], alone["decode", d]) / (p.gpus + d.gpus), p, d)
        for p, d in itertools.product(feasible(task), repeat=2)
        if p.stages == d.stages and p.tensor + d.tensor <= NODE_GPUS
    ]
    best: Placement | None = None
    for bound, p, d in sorted(pairs, reverse=True):
        if best is not None and bound <= best.per_gpu:
            break
        found = Placement(p, 1, d, 1, joint_goodput(task, Placement(p, 1, d, 1, 0.0), bound * (p.gpus + d.gpus)))
        if best is None or found.per_gpu > best.per_gpu:
            best = found
    assert best is not None, f"{task.model} fits nowhere"
    return best


def high_affinity(alone: Alone, gpus: int = NODES * NODE_GPUS) -> Placement:
    """Algorithm 1, for the highest rate whose instances fit on so many GPUs."""
    p, p_rate = _best(alone, "prefill")
    d, d_rate = _best(alone, "decode")
    rate, n, m = max(_mixes(p, p_rate, d, d_rate, gpus))
    return Placement(p, n, d, m, rate)


def _mixes(p: Parallelism, p_rate: float, d: Parallelism, d_rate: float, gpus: int) -> Iterator[tuple[float, int, int]]:
    """(rate, prefills, decodes) of the mixes that fit; ceil(R / goodput) of each carries a rate R."""
    for n in range(1, gpus // p.gpus + 1):
        m = min((gpus - n * p.gpus) // d.gpus, math.ceil(n * p_rate / d_rate))
        if m:
            yield min(n * p_rate, m * d_rate), n, m


def _best(alone: Alone, phase: str) -> tuple[Parallelism, float]:
    found = {each: rate for (which, each), rate in alone.items() if which == phase}
    best = max(found, key=lambda each: found[each] / each.gpus)
    return best, found[best]


def feasible(task: Task) -> list[Parallelism]:
    """Those with constants and room for the longest request."""
    longest = int(task.lengths.sum(axis=1).max())
    tried = itertools.product(degrees(task.data_dir, task.model), task.stages)
    return [Parallelism(*each) for each in tried if (kv_room(task.data_dir, task.model, *each) or 0) // each[1] >= longest]


def phase_goodput(task: Task, phase: str, each: Parallelism) -> float:
    """`simu_prefill` and `simu_decode`: the highest rate that one instance carries, the other phase taking no time."""

    def keeps_ttft(rate: float) -> bool:
        prompts = served(task, Placement(each, 1, each, 1, rate), rate, decoding=False)
        return prompts.attainment(task.ttft_s, math.inf) >= task.share

    def keeps_tpot(rate: float) -> bool:
        return _decoded(task, each, rate).attainment(math.inf, task.tpot_s) >= task.share

    if phase == "prefill":
        return highest_rate(keeps_ttft, 1.0 / prefill_kind(task, each).table.prefill_s(int(task.lengths[:, 0].mean())))
    return each.stages * highest_rate(keeps_tpot, 4.0)


def joint_goodput(task: Task, placement: Placement, guess: float = 4.0) -> float:
    """`simulate`: the highest rate at which enough requests keep both bounds."""
    return highest_rate(
        lambda rate: served(task, placement, rate).attainment(task.ttft_s, task.tpot_s) >= task.share, max(guess, 1e-3)
    )


def served(task: Task, placement: Placement, rate: float, *, decoding: bool = True, link: float = NVLINK_BYTES_S) -> Served:
    """A placement under a rate, in requests per second."""
    token_s = model_shape(task.model).kv_bytes_per_token() / link
    return Disaggregated(
        poisson(task.lengths, rate, task.seed, task.span_s),
        prefill_kind(task, placement.prefill),
        placement.prefills,
        decode_kind(task, placement.decode),
        placement.decodes * placement.decode.stages,
        prefill_stages=placement.prefill.stages,
        transfer_s=lambda tokens: tokens * token_s,
        decoding=decoding,
    ).run()


def prefill_kind(task: Task, each: Parallelism) -> EngineKind:
    """One stage of it."""
    table = step_table(task.data_dir, task.model, each.tensor, "distserve", task.prefill_cost)
    return EngineKind(
        table=table.stretched(prefill=1 / each.stages, decode=1 / each.stages),
        kv_tokens=_room(task, each),
        budget_tokens=SATURATING_TOKENS,
        batching=WHOLE_PROMPTS,
    )


def decode_kind(task: Task, each: Parallelism) -> EngineKind:
    """One of its batches."""
    return EngineKind(
        table=step_table(task.data_dir, task.model, each.tensor, "distserve", task.prefill_cost),
        kv_tokens=_room(task, each) // each.stages,
        places=DECODING_PLACES,
        batching=WHOLE_PROMPTS,
    )


def _room(task: Task, each: Parallelism) -> int:
    found = kv_room(task.data_dir, task.model, *each)
    assert found is not None, f"{task.model} was not measured with {each}"
    return found


def _decoded(task: Task, each: Parallelism, rate: float) -> Served:
    """One of its batches; prompts are there as they arrive, in no time: what is left is waiting for room, and decoding."""
    instant = prefill_kind(task, each)
    instant = msgspec.structs.replace(instant, table=instant.table.stretched(prefill=1e-9, decode=1e-9))
    return Disaggregated(poisson(task.lengths, rate, task.seed, task.span_s), instant, 1, decode_kind(task, each), 1).run()
