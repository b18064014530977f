"""What a pass of the controller costs: `python -m benchmarks.control_pass [--replicas 1000] [--json]`.

Observe from reports, decide, write the journal, act on fakes; at 100, 1,000 and 10,000 replicas. Real are the controller's loop,
the snapshot's assembling, the window of counters, the default pipeline and the journal on disk. Made up are the membership table,
load reports that all change from pass to pass, the counters of four gateways and two models each second, and hands that start and
end replicas in a table. Demand swells and ebbs by a fifth within four minutes, so that passes act. A pass is a second of the
world's time; what makes the world up is not timed, nor is taking reports off the wire, which happens between passes. Parts and CPU
seconds are medians, too; on a busy machine they say more than the wall clock's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.actions import Action, ChangeRole, Decision, DrainReplica, StartReplica
from cluster.fleet import Fleet, ModelSpec, NodeSpec, Pace, PipelineSpec, ReplicaGroup
from cluster.metrics import (
    ARRIVALS,
    ARRIVED_TOKENS,
    ARRIVED_TOKENS_SQUARED,
    CACHED_TOKENS,
    DEMAND_NAMES,
    IN_FLIGHT,
    LATENCY_BUCKETS_S,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    QUEUED,
    REQUESTS,
    TPOT,
    TTFT,
    Sample,
)
from cluster.placement import group_of
from cluster.replica import Load, Phase, Replica, Role
from cluster.slo import Slo
from cluster.snapshot import ClusterSnapshot, Group
from controller.act.orders import Settled
from controller.controller import Controller, Course
from controller.journal import Entry, Journal
from controller.memory import Memory
from controller.observe.assemble import SPAN_S, Heard, Seen, Started, assemble
from controller.observe.window import Window
from controller.pipelines import as_text, build
from policies.flow import Flow
from policies.pipeline import Pipeline
from policies.sizing import Bounds, decode_fits, prefill_fits, smallest
from workers.build_engine import performance_of

SIZES = {100: 300, 1000: 300, 10_000: 120}
"""Passes timed, by replicas."""
WARM_PASSES = 5
GATEWAYS = 4
PER_NODE = 8
SWELL, SWELL_S = 0.2, 240.0
PACE = Pace(shape="llama-3.1-8b", accelerator="h100")
SLO = Slo(ttft_s=1.0, tpot_s=0.03)
PROMPT_MEAN, PROMPT_SD, OUTPUT_MEAN, CACHED_SHARE = 1000, 700, 200, 0.25
BARS_MS = {1000: 50.0, 10_000: 500.0}
JOURNAL_BAR_MB = 1000.0
START_S = 1_800_000_000.0


class Passes(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of each pass, whole and in part, and what came of them."""

    whole_s: Sequence[float]
    parts_s: Mapping[str, Sequence[float]]
    actions: int
    journal_bytes: float
    """Per pass."""


class Laps:
    """Seconds spent in each part of each pass."""

    def __init__(self) -> None:
        self.took_s: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def lap(self, part: str, clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
        began_s = clock()
        yield
        self.took_s.setdefault(part, []).append(clock() - began_s)


class World:
    """A cluster in a table: an observer and an actuator over it."""

    def __init__(self, replicas: int, laps: Laps) -> None:
        self.now_s = START_S
        self._chance, self._noise = random.Random(0), np.random.default_rng(0)
        self._performance = performance_of(PACE)
        self._rates = {"chat": 0.0, "code": 0.0}
        self._fleet = self._sized(replicas)
        self._specs = {group_of(self._fleet, spec): spec for spec in self._fleet.replicas}
        self._rows: dict[str, Replica] = {}
        self._started: dict[str, Started] = {}
        self._since_s: dict[str, float] = {}
        self._heard: dict[str, Heard] = {}
        self.window = Window(SPAN_S)
        self._totals: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._laps = laps

    def past(self) -> None:
        """What the window holds once it is full, and the replicas that the config asks for."""
        nodes = {pool: [node.name for node in self._fleet.nodes if node.pool == pool] for pool in ("p", "q")}
        number = 0
        for name, spec in self._specs.items():
            for _ in range(spec.count):
                self._join(f"{spec.role.value}-{spec.pool}-{number}", name, nodes[spec.pool][number % len(nodes[spec.pool])])
                number += 1
        self.next_replica = number
        for _ in range(round(SPAN_S)):
            self.pass_second(loads=False)

    def pass_second(self, *, loads: bool = True) -> None:
        """What happens between two passes."""
        self.now_s += 1.0
        for name, start in list(self._started.items()):
            if self.now_s - start.at_s > 10.0:
                del self._started[name]
                self._join(name, start.group, start.node)
        for gateway in range(GATEWAYS):
            self.window.add(self.now_s - 0.1 * gateway, list(self._counters(f"10.0.0.{gateway}:8000")))
        if loads:
            self._report()

    async def observe(self, memory: Memory) -> ClusterSnapshot:
        with self._laps.lap("observe"):
            return await self._seen(memory)

    async def _seen(self, memory: Memory) -> ClusterSnapshot:
        seen = Seen(
            replicas=tuple(self._rows[name] for name in sorted(self._rows)),
            started=self._started,
            heard=self._heard,
            since_s=self._since_s,
            alive=frozenset(node.name for node in self._fleet.nodes),
        )
        telemetry = await self.window.series(DEMAND_NAMES, self.now_s)
        return assemble(self._fleet, seen, telemetry, memory, self.now_s)

    def settle(self, snapshot: ClusterSnapshot, memory: Memory) -> Settled:
        """What is done is done at once, and has no outcome worth a word."""
        return Settled(memory=memory)

    def apply(self, number: int, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case StartReplica():
                    self._started[action.replica_id] = Started(group=action.group, node=action.node, at_s=self.now_s)
                case DrainReplica():
                    self._rows.pop(action.replica_id, None)
                    self._started.pop(action.replica_id, None)
                    self._heard.pop(action.replica_id, None)
                case ChangeRole():
                    self._rows[action.replica_id] = msgspec.structs.replace(self._rows[action.replica_id], role=action.role)

    def _sized(self, replicas: int) -> Fleet:
        """As many replicas as their demand needs: half of them prefill and decode of one model, half mixed of another."""
        flow = Flow(
            rate_rps=1.0,
            prompt_tokens=PROMPT_MEAN * (1 - CACHED_SHARE),
            prompt_tokens_sd=PROMPT_SD,
            context_tokens=PROMPT_MEAN,
            output_tokens=OUTPUT_MEAN,
        )
        group = Group(
            model="m",
            role=Role.MIXED,
            pool="p",
            min_replicas=1,
            max_replicas=1,
            wanted=1,
            performance=self._performance,
            kv_tokens=480_000,
            max_running=128,
            step_budget_tokens=1024,
            startup_s=10.0,
        )

        def needs(rate_rps: float) -> dict[str, int]:
            bounds, asked = Bounds(), flow.at(rate_rps)
            return {
                "prefill": smallest(partial(prefill_fits, group, asked, SLO, bounds)),
                "decode": smallest(partial(decode_fits, group, asked, SLO, bounds, prefilling=False)),
                "mixed": smallest(partial(decode_fits, group, asked, SLO, bounds, prefilling=True)),
            }

        probe = needs(float(replicas))
        self._rates["chat"] = replicas / 2 * replicas / (probe["prefill"] + probe["decode"])
        self._rates["code"] = replicas / 2 * replicas / probe["mixed"]
        apart, together = needs(self._rates["chat"]), needs(self._rates["code"])
        counts = (("chat", Role.PREFILL, "p", apart), ("chat", Role.DECODE, "p", apart), ("code", Role.MIXED, "q", together))
        groups = tuple(
            ReplicaGroup(
                model=model,
                role=role,
                pool=pool,
                engine="emulated",
                pace=PACE,
                count=need[role.value],
                min_replicas=1,
                max_replicas=2 * need[role.value],
                kv_blocks=30_000,
                max_running=128,
                step_budget_tokens=1024,
                startup_s=10.0,
            )
            for model, role, pool, need in counts
        )
        nodes = tuple(
            NodeSpec(name=f"node-{pool}-{number}", pool=pool, slots=PER_NODE, zone="abc"[number % 3], price_usd_per_hour=24.0)
            for pool in ("p", "q")
            for number in range(math.ceil(replicas * 0.8 / PER_NODE))
        )
        models = (ModelSpec(name="chat", path="chat"), ModelSpec(name="code", path="code"))
        return Fleet(models=models, nodes=nodes, replicas=groups, slo={"default": SLO})

    def _join(self, name: str, group: str, node: str) -> None:
        spec = self._specs[group]
        self._since_s[name] = self.now_s
        self._rows[name] = Replica(
            replica_id=name,
            worker_id=f"worker-of-{name}",
            node=node,
            endpoint="127.0.0.1:1",
            role=spec.role,
            phase=Phase.READY,
            model=spec.model,
            engine="emulated",
            performance=self._performance,
            kv_blocks=spec.kv_blocks,
            context_tokens=32_768,
            max_running=spec.max_running,
            step_budget_tokens=spec.step_budget_tokens,
            ready_since_s=self.now_s,
        )

    def _report(self) -> None:
        """Every replica's load walks on."""
        names = list(self._rows)
        running, context, blocks = (self._noise.integers(-by, by + 1, len(names)).tolist() for by in (2, 2000, 120))
        late = (self._noise.random(len(names)) * 0.2).tolist()
        step_s, power_w = self._noise.normal(0.012, 2e-4, len(names)).tolist(), self._noise.normal(450, 8, len(names)).tolist()
        slowdown = self._noise.normal(1.0, 0.01, len(names)).tolist()
        waiting = self._noise.integers(0, 4, len(names)).tolist()
        for index, name in enumerate(names):
            known = self._heard.get(name)
            old = known.load if known else None
            load = Load(
                replica_id=name,
                sequence=(old.sequence if old else 0) + 5,
                at_s=self.now_s - late[index],
                phase=Phase.READY,
                running=max(0, (old.running if old else 40) + running[index]),
                waiting=waiting[index] // 3,
                waiting_tokens=waiting[index] // 3 * 700,
                kv_tokens=max(0, (old.kv_tokens if old else 60_000) + context[index]),
                kv_blocks_used=max(0, (old.kv_blocks_used if old else 4000) + blocks[index]),
                step_s=step_s[index],
                slowdown=slowdown[index],
                power_w=power_w[index],
            )
            self._heard[name] = Heard(load=load, at_s=self.now_s - late[index])

    def _counters(self, instance: str) -> Iterator[Sample]:
        """One gateway's, after one more second of its part of the demand."""
        for model, mean_rps in self._rates.items():
            rate_rps = mean_rps / GATEWAYS * (1.0 + SWELL * math.sin(self.now_s / SWELL_S * 2 * math.pi))
            count = float(self._noise.poisson(rate_rps))
            spread = max(0.0, float(self._noise.normal(1.0, PROMPT_SD / PROMPT_MEAN / math.sqrt(count + 1))))
            rises = {
                ARRIVALS: count,
                ARRIVED_TOKENS: round(count * PROMPT_MEAN * spread),
                ARRIVED_TOKENS_SQUARED: round(count * (PROMPT_MEAN**2 + PROMPT_SD**2) * spread * spread),
                REQUESTS: count,
                PROMPT_TOKENS: round(count * PROMPT_MEAN * spread),
                CACHED_TOKENS: round(count * CACHED_SHARE * PROMPT_MEAN * spread * spread),
                OUTPUT_TOKENS: round(count * OUTPUT_MEAN * spread),
            }
            labels = (("instance", instance), ("model", model))
            for name, by in rises.items():
                yield self._risen(name, labels, by)
            for name, mean_s in ((TTFT, 0.3), (TPOT, 0.02)):
                for bound_s in (*LATENCY_BUCKETS_S, math.inf):
                    within = round(count * (1.0 - math.exp(-bound_s / mean_s / spread)))
                    bound = "+Inf" if math.isinf(bound_s) else str(bound_s)
                    yield self._risen(name, (("instance", instance), ("le", bound), ("model", model)), within)
            yield Sample(QUEUED, labels, 0.0)
            yield Sample(IN_FLIGHT, labels, round(rate_rps * 5))

    def _risen(self, name: str, labels: tuple[tuple[str, str], ...], by: float) -> Sample:
        self._totals[name, labels] = total = self._totals.get((name, labels), 0.0) + by
        return Sample(name, labels, total)


class TimedPipeline(Pipeline, frozen=True, kw_only=True):
    """A pipeline that tells what deciding took."""

    laps: Laps

    def decide(self, snapshot: ClusterSnapshot) -> Decision:
        with self.laps.lap("decide"):
            return super().decide(snapshot)


class TimedJournal(Journal):
    """A journal that tells what writing took."""

    def __init__(self, path: Path, laps: Laps) -> None:
        super().__init__(path)
        self._laps = laps

    def write(self, entry: Entry) -> None:
        with self._laps.lap("journal"):
            super().write(entry)


async def measure(replicas: int, passes: int) -> Passes:
    laps = Laps()
    world = World(replicas, laps)
    world.past()
    spec = PipelineSpec()
    pipeline = TimedPipeline(laps=laps, **msgspec.structs.asdict(build(spec)))
    actions = 0
    with tempfile.TemporaryDirectory() as folder:
        journal = TimedJournal(Path(folder) / "journal.sqlite", laps)
        course = Course(pipeline=pipeline, text=as_text(spec))
        memory = Memory(next_replica=world.next_replica)
        loop = Controller(world, world, journal, course, memory=memory, epoch=1, clock=lambda: world.now_s)
        for number in range(WARM_PASSES + passes):
            if number == WARM_PASSES:
                laps.took_s.clear()
                began_bytes = journal.used_bytes
            world.pass_second()
            with laps.lap("whole"), laps.lap("cpu", time.process_time):
                decision = await loop.once()
            assert not decision.failed, decision.failed
            actions += len(decision.actions)
            _progress(f"{replicas:,} replicas: pass {number + 1} of {WARM_PASSES + passes}, {len(decision.targets)} groups")
        journal_bytes = (journal.used_bytes - began_bytes) / passes
        journal.close()
    return Passes(whole_s=laps.took_s.pop("whole"), parts_s=laps.took_s, actions=actions, journal_bytes=journal_bytes)


def quantile_ms(values_s: Sequence[float], share: float) -> float:
    return float(np.quantile(values_s, share)) * 1e3


def figures(measured: Mapping[int, Passes]) -> dict[str, float]:
    found: dict[str, float] = {}
    for size, passes in measured.items():
        found[f"pass_ms_{size}"] = quantile_ms(passes.whole_s, 0.5)
        found[f"pass_p99_ms_{size}"] = quantile_ms(passes.whole_s, 0.99)
        found |= {f"{part}_ms_{size}": quantile_ms(took_s, 0.5) for part, took_s in passes.parts_s.items()}
        found[f"actions_{size}"] = passes.actions
        found[f"journal_mb_per_day_{size}"] = passes.journal_bytes * 86_400 / 1e6
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--replicas", type=int, choices=tuple(SIZES), action="append", help="only these sizes")
    asked = parser.parse_args()
    measured = {size: asyncio.run(measure(size, SIZES[size])) for size in asked.replicas or SIZES}
    found = figures(measured)
    _print(measured, found)
    if asked.json:
        print(json.dumps(found))


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<78}", end="", file=sys.stderr, flush=True)


def _print(measured: Mapping[int, Passes], found: Mapping[str, float]) -> None:
    table = Table(title="One pass of the controller, by replicas, ms")
    for column in ("fleet", "P50", "bound", "P99", "CPU", "observe", "decide", "journal", "MB/day"):
        table.add_column(column, justify="right")
    for size in measured:
        bar = f"{BARS_MS[size]:.0f}" if size in BARS_MS else ""
        names = ("pass_p99", "cpu", "observe", "decide", "journal")
        p99, *parts = (f"{found[f'{name}_ms_{size}']:.1f}" for name in names)
        mb = f"{found[f'journal_mb_per_day_{size}']:,.0f}"
        table.add_row(f"{size:,}", f"{found[f'pass_ms_{size}']:.1f}", bar, p99, *parts, mb)
    Console().print(table)


if __name__ == "__main__":
    main()
