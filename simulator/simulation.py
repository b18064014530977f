"""One run: a workload arrives, gateways route it, replicas serve it, a controller decides; until the last token."""

from __future__ import annotations

import itertools
import math
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from cluster.errors import InvalidTrace
from cluster.fleet import Fleet
from cluster.record import TraceRow
from cluster.slo import Slo
from controller.config.gateway import router_of
from controller.pipelines import build
from policies.pipeline import Pipeline
from policies.policy import Router
from simulator.accounts import HOUR_S, Accounts
from simulator.cluster import SimulatedCluster
from simulator.control import PASS_S, Control
from simulator.engines import Engines
from simulator.faults import Faults, check_faults
from simulator.flight import Flight
from simulator.gateway import RETRY_ROUTE_S, SimulatedGateway
from simulator.host import Host
from simulator.machines import check_slo, machines_of, model_asked, warnings_of
from simulator.result import ClassResult, Event, Quantiles, Result
from simulator.serving import Serving
from simulator.sketch import mean_s, quantiles_s
from simulator.steps import records
from simulator.timeline import Timeline, stream
from simulator.world import World
from workloads.blocks import split_blocks

MAX_EVENTS = 10_000
DEFAULT = "default"
JOULES_PER_KWH = 3.6e6


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated."""

    fleet: Fleet
    world: World = World()
    seed: int = 0
    warm_up_s: float = 60.0
    """Requests that arrive before it do not count: caches and batches are empty at first."""
    control: bool = True
    """False: the fleet stays as it is."""
    model: str = ""
    """That the workload asks for; may be left out of a fleet with a single one."""
    label: str = ""
    """Of the workload, in words."""
    stepwise: bool = False
    """Take every step by itself: slow, and the same."""


class Simulation:
    """Made, run once, and asked for its result."""

    def __init__(
        self,
        setup: Setup,
        rows: Iterator[TraceRow],
        *,
        router: Router | None = None,
        pipeline: Pipeline | None = None,
        ended: Callable[[Flight, float], None] = lambda flight, now_s: None,
        rejected: Callable[[Flight, str], None] = lambda flight, why: None,
        progress: Callable[[float, int], None] = lambda now_s, arrived: None,
    ) -> None:
        """router, pipeline: instead of those that the fleet names. ended: told of each request that has had its last token, and
        when. rejected: told of each that got no answer, or not all of it, and why. progress: told once a simulated second of the
        time and of how many have arrived. Raises InvalidConfig for what cannot be."""
        self.setup, self._ended, self._told_rejected, self._progress = setup, ended, rejected, progress
        fleet, world, seed = setup.fleet, setup.world, setup.seed
        self._machines = machines_of(fleet, world)
        self.slos = {**fleet.slo} if DEFAULT in fleet.slo else {DEFAULT: Slo(), **fleet.slo}
        for name, slo in self.slos.items():
            check_slo(name, slo, self._machines)
        check_faults(fleet, world)
        self._model = model_asked(fleet, setup.model)
        router = router or router_of(fleet)
        self._blocks = min(spec.block_tokens for spec in fleet.replicas)
        self._rows, self._numbers = rows, itertools.count()
        self.timeline = Timeline()
        self.engines = Engines(
            tuple(self.slos.values()),
            counted_from_s=setup.warm_up_s,
            reply_s=world.hop_s,
            telling=getattr(router, "reads_index", True),
            stepwise=setup.stepwise,
        )
        self.hosts: dict[str, Host] = {}
        self.serving = Serving(self.timeline, self.engines, world, self.hosts, self._finish)
        self.cluster = SimulatedCluster(
            fleet, world, self._machines, self.timeline, self.engines, self.serving, self.hosts, seed=seed, note=self._note
        )
        self.gateways = tuple(
            SimulatedGateway(
                f"gateway-{number}",
                router=router,
                spec=fleet.gateway,
                slos=self.slos,
                models=[model.name for model in fleet.models],
                send=self.serving.send,
                rejected=self._reject,
            )
            for number in range(fleet.gateway.replicas)
        )
        self.serving.serve(self.gateways)
        self._choice = stream(seed, "gateways")
        self._classes = {name: number for number, name in enumerate(self.slos)}
        self.in_flight = self.arrived = self.completed = 0
        self._counted = [0] * len(self._classes)
        self._rejected: Counter[str] = Counter()
        self._rejections = 0
        self._longest = 0
        self.events: list[Event] = []
        self._accounts = Accounts(fleet, self.cluster, self.engines)
        self._cpu_s = 0.0
        self._interrupted = False
        self.control = Control(pipeline or build(fleet.control.pipeline), self.cluster) if setup.control else None
        self._faults = Faults(fleet, world, self.timeline, self.cluster, seed, self._note)
        self.cluster.begin(self.gateways)
        self.timeline.after(PASS_S, self._pass)
        self.timeline.after(RETRY_ROUTE_S, self._tick)
        if setup.warm_up_s > 0.0:
            self.timeline.after(setup.warm_up_s, lambda: self._accounts.begin(self.timeline.now_s))
        self._last_arrival_s = 0.0
        self._coming = next(self._rows, None)

    # ── time ──

    def run(self) -> Result:
        """To the last token. An interrupt ends it early, and keeps what has been found."""
        began_s = time.process_time()
        try:
            while self._coming is not None or self.in_flight:
                self._turn()
        except KeyboardInterrupt:
            self._interrupted = True
        self._cpu_s = time.process_time() - began_s
        return self.result()

    def _turn(self) -> None:
        """To the next thing that happens outside of engines."""
        arrival_s = math.inf if self._coming is None else self._coming.arrival_s
        next_s = min(arrival_s, self.timeline.next_s, self.serving.next_s)
        if not self.serving.advance(next_s):
            return
        self.serving.deliver(next_s)
        if self.timeline.next_s <= next_s:
            self.timeline.run_next()
        elif arrival_s <= next_s:
            self.timeline.now_s = next_s
            self._arrive()
        else:
            self.timeline.now_s = next_s

    def _arrive(self) -> None:
        row = self._coming
        assert row is not None, "nobody arrives"
        self._coming = next(self._rows, None)
        if self._coming is not None and self._coming.arrival_s < row.arrival_s:
            raise InvalidTrace(f"a request at {self._coming.arrival_s} s comes after one at {row.arrival_s} s: sort the trace")
        now_s, number = self.timeline.now_s, next(self._numbers)
        kind = self._classes.get(row.slo_class, self._classes[DEFAULT])
        self.arrived += 1
        self._longest = max(self._longest, row.prompt_tokens)
        self._counted[kind] += now_s >= self.setup.warm_up_s
        self.in_flight += 1
        self._last_arrival_s = now_s
        flight = Flight(str(number), row, self._hashes(row), kind, now_s)
        gateways = self.gateways
        gateway = gateways[0] if len(gateways) == 1 else self._choice.choice(gateways)
        gateway.arrive(flight, self._model, now_s)

    def _hashes(self, row: TraceRow) -> tuple[int, ...]:
        if not row.block_hashes:
            return ()
        return split_blocks(row, self._blocks)

    def _finish(self, flight: Flight, now_s: float) -> None:
        self.in_flight -= 1
        self.completed += 1
        self._ended(flight, now_s)

    def _reject(self, flight: Flight, why: str) -> None:
        self.serving.give_up(flight)
        self.in_flight -= 1
        self._rejections += 1
        self._told_rejected(flight, why)
        if flight.arrival_s >= self.setup.warm_up_s:
            self._rejected[why] += 1

    def _note(self, kind: str, what: str) -> None:
        if len(self.events) < MAX_EVENTS:
            self.events.append(Event(at_s=round(self.timeline.now_s, 3), kind=kind, what=what))

    def _tick(self) -> None:
        """Gateways look again at who waits, as live ones do."""
        self.timeline.after(RETRY_ROUTE_S, self._tick)
        for gateway in self.gateways:
            if gateway.waiting:
                gateway.pump(self.timeline.now_s)

    def _pass(self) -> None:
        """Each second: counters, the controller's pass, the accounts."""
        self.timeline.after(PASS_S, self._pass)
        self.cluster.count()
        if self.control is not None:
            self.control.once()
        totals = {"arrivals": self.arrived, "completions": self.completed, "rejections": self._rejections}
        self._accounts.note(PASS_S, totals, self.in_flight, sum(gateway.waiting for gateway in self.gateways))
        self._progress(self.timeline.now_s, self.arrived)

    # ── accounts ──

    @property
    def missed(self) -> int:
        """Of the requests that count, how many have ended outside their SLO or were turned away by now. It never falls."""
        tallies = self.engines.state.tallies.sum(axis=0)
        return int(tallies[records.ENDED] - tallies[records.KEPT]) + self._rejected.total()

    def result(self) -> Result:
        """As of now."""
        state, now_s, warm_up_s = self.engines.state, self.timeline.now_s, self.setup.warm_up_s
        worked = self._accounts.worked(now_s)
        kwh = worked.energy_j / JOULES_PER_KWH
        tallies = state.tallies.sum(axis=0)
        arrived, kept, output = sum(self._counted), int(tallies[records.KEPT]), int(tallies[records.OUTPUT_TOKENS])
        prompt = int(tallies[records.PROMPT_TOKENS])
        made, usd = worked.output_tokens, self._accounts.usd
        span_s = max(self._last_arrival_s - warm_up_s, 1e-9)
        return Result(
            workload=self.setup.label,
            fleet=self.setup.fleet.name,
            seed=self.setup.seed,
            span_s=now_s,
            warm_up_s=warm_up_s,
            arrived=arrived,
            completed=int(tallies[records.ENDED]),
            rejected=dict(self._rejected.most_common()),
            kept=kept,
            retries=sum(gateway.retries for gateway in self.gateways),
            preemptions=worked.preemptions,
            transfers=self.serving.transfers,
            classes={name: self._of_class(name, number) for name, number in self._classes.items() if self._counted[number]},
            itl_s=_quantiles(state.sketches[0, records.ITL]),
            attainment=kept / arrived if arrived else 0.0,
            goodput_rps=kept / span_s,
            output_tokens=output,
            prompt_tokens=prompt,
            cached_share=int(tallies[records.CACHED_TOKENS]) / prompt if prompt else 0.0,
            usd=usd,
            usd_per_million_output_tokens=1e6 * usd / made if made else None,
            kwh=kwh,
            kwh_per_million_output_tokens=1e6 * kwh / made if made else None,
            replica_hours=worked.present_s / HOUR_S,
            utilisation=worked.busy_s / worked.present_s if worked.present_s else 0.0,
            acts=self.control.acts if self.control is not None else [],
            events=self.events,
            course=self._accounts.course.course(),
            warnings=warnings_of(self._machines, self._longest) if self._longest else [],
            interrupted=self._interrupted,
            passes=self.control.passes if self.control is not None else 0,
            cpu_s=self._cpu_s,
            requests_per_cpu_s=self.arrived / self._cpu_s if self._cpu_s else 0.0,
            peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        )

    def _of_class(self, name: str, number: int) -> ClassResult:
        state = self.engines.state
        return ClassResult(
            slo=self.slos[name],
            arrived=self._counted[number],
            completed=int(state.tallies[number, records.ENDED]),
            kept=int(state.tallies[number, records.KEPT]),
            ttft_s=_quantiles(state.sketches[number, records.TTFT]),
            tpot_s=_quantiles(state.sketches[number, records.TPOT]),
            e2e_s=_quantiles(state.sketches[number, records.E2E]),
        )


def _quantiles(counts: np.ndarray) -> Quantiles | None:
    found, mean = quantiles_s(counts, (0.5, 0.9, 0.99)), mean_s(counts)
    if found is None or mean is None:
        return None
    p50, p90, p99 = found
    return Quantiles(mean=mean, p50=p50, p90=p90, p99=p99, count=int(counts.sum()))
