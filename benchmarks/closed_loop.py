"""A fleet in virtual time: requests arrive, are routed, run on emulated engines, and somebody says how many replicas there are.

Real are the engines (`workers.engines.emulated`, stepped by hand), the router with its view of the fleet, the gateway's counters as
the controller's window keeps them, the snapshot's assembling, the pipeline and the controller's memory. Simpler than life: one
gateway, whose queue is one line with the gateway's bounds; messages take no time; prompts share nothing, so no block events; a
start takes its time and succeeds; a drain ends with its last stream. All of an hour takes as long as computing its steps does.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import msgspec

from cluster.actions import Action, DrainReplica, Reason, StartReplica
from cluster.fleet import Fleet, GatewaySpec, ModelSpec, NodeSpec, Pace, PipelineSpec, ReplicaGroup
from cluster.handoff import Token
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
from cluster.record import TraceRow
from cluster.replica import Load, Phase, Replica, Role
from cluster.request import Request, SamplingParams
from cluster.slo import Slo
from controller.memory import GroupMemory, Memory, after, with_start
from controller.observe.assemble import SPAN_S, Heard, Seen, Started, assemble
from controller.observe.window import Window
from controller.pipelines import build
from policies.flow import Flow
from policies.pipeline import Pipeline
from policies.route import Ask, Rejection
from policies.routing import PredictedLatencyRouter
from policies.routing_view import FleetView
from policies.sizing import Bounds, decode_fits, smallest
from workers.build_engine import performance_of
from workers.engines.emulated import EmulatedEngine
from workers.engines.engine import StepOutput, Submission
from workers.engines.step_driver import ManualDriver
from workloads.generators import Generator, Lengths

START_S = 1_800_000_000.0
REPORTS_PER_PASS = 5  # Every 200 ms, as workers report.
PASS_S = 1.0
VOCABULARY = 32_000
MODEL = "m"
POOL = "default"
QUEUE_TARGET = 12.0
"""Requests in flight per replica for the queue-length rule: what a replica of `Setting` holds where the sizing has it full."""


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What is served, on what, and what is promised: a model of 70B parameters on four A100 is asked for short answers."""

    pace: Pace = Pace(shape="llama-3.1-70b", accelerator="a100-80g", tensor_parallel=4)
    slo: Slo = Slo(ttft_s=2.0, tpot_s=0.1)
    prompt: Lengths = Lengths(kind="lognormal", first=1000, second=0.6, low=16, high=6000)
    output: Lengths = Lengths(kind="lognormal", first=80, second=0.6, low=16, high=400)
    replicas: int = 1
    """At the beginning, READY."""
    max_replicas: int = 32
    startup_s: float = 60.0
    kv_blocks: int = 1500
    block_tokens: int = 128
    """Large, since nothing is shared and each block costs the emulation time."""
    max_running: int = 64
    step_budget_tokens: int = 1024

    @property
    def fleet(self) -> Fleet:
        group = ReplicaGroup(
            role=Role.MIXED,
            count=self.replicas,
            min_replicas=1,
            max_replicas=self.max_replicas,
            startup_s=self.startup_s,
            engine="emulated",
            pace=self.pace,
            kv_blocks=self.kv_blocks,
            block_tokens=self.block_tokens,
            max_running=self.max_running,
            step_budget_tokens=self.step_budget_tokens,
        )
        nodes = tuple(NodeSpec(name=f"node-{number}", slots=8) for number in range(math.ceil(self.max_replicas / 8)))
        return Fleet(models=(ModelSpec(name=MODEL, path=MODEL),), nodes=nodes, replicas=(group,), slo={"default": self.slo})

    def carried(self, rate_rps: float) -> int:
        """Replicas that a steady rate needs, as the default sizing has it."""
        memory = Memory(groups={self.group: GroupMemory(wanted=1)})
        (group,) = assemble(self.fleet, Seen(), {}, memory, START_S).groups
        mean, root_mean_square = (self.prompt.first * math.exp(power * self.prompt.second**2 / 2) for power in (1, 2))
        flow = Flow(
            rate_rps=rate_rps,
            prompt_tokens=mean,
            prompt_tokens_sd=math.sqrt(root_mean_square**2 - mean**2),
            context_tokens=mean,
            output_tokens=_mean(self.output),
        )
        return smallest(partial(decode_fits, group, flow, self.slo, Bounds(), prefilling=True))

    @property
    def group(self) -> str:
        return group_of(self.fleet, self.fleet.replicas[0])

    def rows(self, steps: Sequence[tuple[float, float]], seed: int) -> Iterator[TraceRow]:
        """Poisson arrivals. steps: (requests/s, seconds), one after the other."""
        return Generator(steps=tuple(steps), prompt=self.prompt, output=self.output).rows(seed)


class Ended(NamedTuple):
    """One request. Times in seconds from the run's start; None where it never came."""

    arrival_s: float
    ttft_s: float | None
    kept: bool
    """Whether it was inside its SLO."""


class Count(NamedTuple):
    """Replicas from a time on."""

    at_s: float
    wanted: int
    held: int
    """Those that take a place: starting, serving or draining."""
    in_flight: int


class Scaler(Protocol):
    """Says what to start and what to drain, once a second."""

    async def decide(self, loop: ClosedLoop) -> Sequence[Action]: ...

    def started(self, group: str, took_s: float) -> None:
        """A replica has become READY."""
        ...


class PipelineScaler:
    """The controller's own: assemble, decide, remember."""

    def __init__(self, pipeline: Pipeline | None = None) -> None:
        self.memory = Memory(next_replica=1000)
        self._pipeline = pipeline or build(PipelineSpec())

    async def decide(self, loop: ClosedLoop) -> Sequence[Action]:
        telemetry = await loop.window.series(DEMAND_NAMES, loop.now_s)
        snapshot = assemble(loop.fleet, loop.seen(), telemetry, self.memory, loop.now_s)
        decision = self._pipeline.decide(snapshot)
        assert not decision.failed, decision.failed
        self.memory = after(self.memory, snapshot, decision, applied=True)
        return decision.actions

    def started(self, group: str, took_s: float) -> None:
        self.memory = with_start(self.memory, group, took_s)


class QueueRule:
    """Requests in flight per replica against a target, with the defaults of Kubernetes' horizontal autoscaler.

    Each 15 s; a tenth off the target is left alone; up by four or double at most, at once; down to the highest wish of the last
    five minutes. In its favour it reads the requests in flight of this instant, where a cluster's metrics are 15 to 60 s old.
    Source: kubernetes.io, "Horizontal Pod Autoscaling", and `--horizontal-pod-autoscaler-*` of kube-controller-manager.
    """

    period_s, tolerance, stabilisation_s, up_least = 15.0, 0.1, 300.0, 4

    def __init__(self, target: float) -> None:
        """target: requests in flight per replica, > 0."""
        self._target = target
        self._due_s = -math.inf
        self._wishes: deque[tuple[float, int]] = deque()
        """What was found right, and when; at first what there was."""
        self._next = 1000

    async def decide(self, loop: ClosedLoop) -> Sequence[Action]:
        if loop.now_s < self._due_s:
            return ()
        self._due_s = loop.now_s + self.period_s
        wanted = self._wanted(loop.now_s, loop.in_flight, loop.wanted, loop.setting.max_replicas)
        reason = Reason(text=f"{loop.in_flight} in flight, {self._target:.1f} per replica")
        if wanted < loop.wanted:
            newest = loop.present()[::-1][: loop.wanted - wanted]
            return [DrainReplica(replica_id=name, deadline_s=math.inf, reason=reason) for name in newest]
        names = [f"mixed-{POOL}-{self._next + index}" for index in range(wanted - loop.wanted)]
        self._next += len(names)
        return [StartReplica(replica_id=name, group=loop.setting.group, node="node-0", reason=reason) for name in names]

    def started(self, group: str, took_s: float) -> None:
        """It does not look at that."""

    def _wanted(self, now_s: float, in_flight: int, current: int, most: int) -> int:
        if not self._wishes:
            self._wishes.append((now_s, current))
        off = abs(in_flight / (current * self._target) - 1.0)
        wish = current if off <= self.tolerance else max(1, math.ceil(in_flight / self._target))
        self._wishes.append((now_s, wish))
        while self._wishes[0][0] < now_s - self.stabilisation_s:
            self._wishes.popleft()
        if wish < current:
            return min(current, max(before for _, before in self._wishes))
        return min(wish, current + max(self.up_least, current), most)


class ClosedLoop:
    """One run. The scaler is asked after each second."""

    def __init__(self, setting: Setting, rows: Iterable[TraceRow], scaler: Scaler) -> None:
        self.setting, self.fleet = setting, setting.fleet
        self.window = Window(SPAN_S)
        self.ended: list[Ended] = []
        self.counts: list[Count] = []
        """One for each second."""
        self._scaler = scaler
        self._performance = performance_of(setting.pace)
        self._driver = ManualDriver()
        self._driver.now_s = START_S
        self._rows, self._number = iter(rows), 0
        self._view, self._router = FleetView(), PredictedLatencyRouter()
        self._router.warm()
        self._output_tokens = _mean(setting.output)
        self._live: dict[str, _Live] = {}
        """In flight, by request id."""
        self._queue: deque[_Live] = deque()
        self._serving: dict[str, _Serving] = {}
        self._started: dict[str, Started] = {}
        self._counters = _Counters()
        for index in range(setting.replicas):
            self._serve(f"mixed-{POOL}-{index}", f"node-{index // 8}", since_s=START_S - 600.0)
        self._tell_members()
        self._next_arrival()

    @property
    def now_s(self) -> float:
        """Unix time."""
        return self._driver.now_s

    @property
    def in_flight(self) -> int:
        """Requests accepted and not ended, those that queue at the gateway among them."""
        return len(self._live)

    @property
    def wanted(self) -> int:
        return len(self.present())

    def present(self) -> list[str]:
        """Replicas that serve or will, oldest first, those that do not serve yet last."""
        return [*(name for name, one in self._serving.items() if one.row.phase is Phase.READY), *self._started]

    def seen(self) -> Seen:
        rows = tuple(self._serving[name].row for name in sorted(self._serving))
        return Seen(
            replicas=rows,
            started=self._started,
            heard={name: one.heard for name, one in self._serving.items() if one.heard is not None},
            since_s={name: one.row.ready_since_s or 0.0 for name, one in self._serving.items()},
            alive=frozenset(node.name for node in self.fleet.nodes),
        )

    async def run(self, seconds: float) -> None:
        """So many more seconds."""
        for _ in range(round(seconds / PASS_S)):
            for _ in range(REPORTS_PER_PASS):
                self._driver.advance(PASS_S / REPORTS_PER_PASS)
                self._report()
                self._pump()
            self._finish_starts()
            self._finish_drains()
            self.window.add(self.now_s, self._counters.samples(len(self._queue), len(self._live)))
            for action in await self._scaler.decide(self):
                self._apply(action)
            held = len(self._serving) + len(self._started)
            self.counts.append(Count(round(self.now_s - START_S, 3), self.wanted, held, self.in_flight))

    # ── replicas ──

    def _apply(self, action: Action) -> None:
        match action:
            case StartReplica():
                self._started[action.replica_id] = Started(group=action.group, node=action.node, at_s=self.now_s)
            case DrainReplica() if action.replica_id in self._started:
                del self._started[action.replica_id]
            case DrainReplica():
                self._serving[action.replica_id].row = msgspec.structs.replace(
                    self._serving[action.replica_id].row, phase=Phase.DRAINING
                )
                self._tell_members()
            case _:
                raise AssertionError(f"{action} in a fleet of one role")

    def _finish_starts(self) -> None:
        due = [name for name, start in self._started.items() if self.now_s - start.at_s >= self.setting.startup_s]
        for name in due:
            start = self._started.pop(name)
            self._serve(name, start.node, since_s=self.now_s)
            self._scaler.started(start.group, self.now_s - start.at_s)
        if due:
            self._tell_members()

    def _finish_drains(self) -> None:
        over = [name for name, one in self._serving.items() if one.row.phase is Phase.DRAINING and not one.requests]
        for name in over:
            del self._serving[name]
        if over:
            self._tell_members()

    def _serve(self, name: str, node: str, since_s: float) -> None:
        setting = self.setting
        engine = EmulatedEngine(
            model=MODEL,
            performance=self._performance,
            kv_blocks=setting.kv_blocks,
            block_tokens=setting.block_tokens,
            context_tokens=8192,
            vocabulary=VOCABULARY,
            driver=self._driver,
            max_running=setting.max_running,
            step_budget_tokens=setting.step_budget_tokens,
        )
        engine.start(self._hear)
        limits = engine.limits
        row = Replica(
            replica_id=name,
            worker_id=name,
            node=node,
            endpoint="",
            role=Role.MIXED,
            phase=Phase.READY,
            model=MODEL,
            engine="emulated",
            performance=self._performance,
            kv_blocks=limits.kv_blocks,
            block_tokens=limits.block_tokens,
            context_tokens=limits.context_tokens,
            max_running=limits.max_running,
            step_budget_tokens=limits.step_budget_tokens,
            ready_since_s=since_s,
        )
        self._serving[name] = _Serving(row, engine)

    def _tell_members(self) -> None:
        self._view.membership([one.row for one in self._serving.values()], self.now_s)

    def _report(self) -> None:
        for name, one in self._serving.items():
            load, one.reports = one.engine.load(), one.reports + 1
            report = Load(
                replica_id=name,
                sequence=one.reports,
                at_s=self.now_s,
                phase=one.row.phase,
                running=load.running,
                waiting=load.waiting,
                waiting_tokens=load.waiting_tokens,
                kv_tokens=load.kv_tokens,
                kv_blocks_used=load.kv_blocks_used,
                step_s=load.step_s,
                slowdown=load.slowdown,
                power_w=load.power_w,
            )
            one.heard = Heard(load=report, at_s=self.now_s)
            self._view.report(report, self.now_s)

    # ── requests ──

    def _next_arrival(self) -> None:
        row = next(self._rows, None)
        if row is not None:
            self._driver.call_at(START_S + row.arrival_s, lambda: self._arrive(row))

    def _arrive(self, row: TraceRow) -> None:
        self._next_arrival()
        self._number += 1
        prompt = (self._number // VOCABULARY, self._number % VOCABULARY, *range(row.prompt_tokens - 2))
        request = Request(
            request_id=f"{self._number}", model=MODEL, prompt=prompt, sampling=SamplingParams(max_tokens=row.output_tokens)
        )
        self._counters.arrived(row.prompt_tokens)
        one = _Live(request, self.now_s)
        self._live[request.request_id] = one
        if self._queue or not self._sent(one):
            self._queue.append(one)
            if len(self._queue) > GATEWAY.max_queue:
                self._refuse(self._queue.pop())

    def _sent(self, one: _Live) -> bool:
        request, slo = one.request, self.setting.slo
        ask = Ask(
            request_id=request.request_id,
            model=MODEL,
            prompt_tokens=len(request.prompt),
            block_hashes=(),
            expected_output_tokens=min(self._output_tokens, request.sampling.max_tokens),
            max_output_tokens=request.sampling.max_tokens,
            ttft_slo_s=slo.ttft_s,
            tpot_slo_s=slo.tpot_s,
        )
        route = self._router.route(ask, self._view.routing_view(MODEL, self.now_s))
        if isinstance(route, Rejection):
            return False
        one.serving = self._serving[route.decode.replica_id]
        one.serving.requests += 1
        self._view.charge(ask, 0, route, self.now_s)
        one.serving.engine.submit(Submission(request=request))
        return True

    def _pump(self) -> None:
        """The gateway's queue: who waited too long goes, and who has room now."""
        while self._queue and self.now_s - self._queue[0].arrival_s > GATEWAY.queue_timeout_s:
            self._refuse(self._queue.popleft())
        while self._queue and self._sent(self._queue[0]):
            self._queue.popleft()

    def _refuse(self, one: _Live) -> None:
        del self._live[one.request.request_id]
        self.ended.append(Ended(one.arrival_s - START_S, None, False))

    def _hear(self, output: StepOutput) -> None:
        for token in output.tokens:
            if token.times is not None:
                self._live[token.request_id].first_s = self.now_s
                self._view.first_token(token.request_id, 0, self.now_s)
            if token.finish is not None:
                self._end(token)

    def _end(self, token: Token) -> None:
        one = self._live.pop(token.request_id)
        assert token.finish == "length", token
        assert one.first_s is not None, token
        assert one.serving is not None, token
        one.serving.requests -= 1
        self._view.settle(token.request_id, 0, self.now_s)
        ttft_s, slo = one.first_s - one.arrival_s, self.setting.slo
        tpot_s = (self.now_s - one.first_s) / token.index if token.index else None
        kept = ttft_s <= (slo.ttft_s or math.inf) and (tpot_s or 0.0) <= (slo.tpot_s or math.inf)
        self._counters.ended(len(one.request.prompt), token.index + 1, ttft_s, tpot_s)
        self.ended.append(Ended(one.arrival_s - START_S, ttft_s, kept))
        if self._queue:
            self._pump()


GATEWAY = GatewaySpec()


class _Live:
    """A request on its way."""

    __slots__ = ("arrival_s", "first_s", "request", "serving")

    def __init__(self, request: Request, arrival_s: float) -> None:
        self.request, self.arrival_s = request, arrival_s
        self.first_s: float | None = None
        self.serving: _Serving | None = None


class _Serving:
    """A replica that serves or drains."""

    def __init__(self, row: Replica, engine: EmulatedEngine) -> None:
        self.row, self.engine = row, engine
        self.requests = self.reports = 0
        self.heard: Heard | None = None


class _Counters:
    """The gateway's, as it exports them."""

    labels = (("instance", "gateway"), ("model", MODEL))
    totals = (ARRIVALS, ARRIVED_TOKENS, ARRIVED_TOKENS_SQUARED, REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS, CACHED_TOKENS)

    def __init__(self) -> None:
        self._totals = dict.fromkeys(self.totals, 0)
        bounds = (*LATENCY_BUCKETS_S, math.inf)
        self._histograms = {name: dict.fromkeys(bounds, 0) for name in (TTFT, TPOT)}

    def arrived(self, prompt_tokens: int) -> None:
        self._totals[ARRIVALS] += 1
        self._totals[ARRIVED_TOKENS] += prompt_tokens
        self._totals[ARRIVED_TOKENS_SQUARED] += prompt_tokens * prompt_tokens

    def ended(self, prompt_tokens: int, output_tokens: int, ttft_s: float, tpot_s: float | None) -> None:
        self._totals[REQUESTS] += 1
        self._totals[PROMPT_TOKENS] += prompt_tokens
        self._totals[OUTPUT_TOKENS] += output_tokens
        for name, value_s in ((TTFT, ttft_s), (TPOT, tpot_s)):
            for bound_s in self._histograms[name] if value_s is not None else ():
                self._histograms[name][bound_s] += value_s <= bound_s

    def samples(self, queued: int, in_flight: int) -> list[Sample]:
        made = [Sample(name, self.labels, float(total)) for name, total in self._totals.items()]
        for name, buckets in self._histograms.items():
            for bound_s, count in buckets.items():
                bound = "+Inf" if math.isinf(bound_s) else str(bound_s)
                made.append(Sample(name, (self.labels[0], ("le", bound), self.labels[1]), float(count)))
        return [*made, Sample(QUEUED, self.labels, float(queued)), Sample(IN_FLIGHT, self.labels, float(in_flight))]


def _mean(lengths: Lengths) -> int:
    """As a gateway would have learnt it."""
    return round(lengths.first * math.exp(lengths.second**2 / 2))
