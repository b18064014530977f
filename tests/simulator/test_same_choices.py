"""A live gateway and a simulated one are told the same, at the same times, and choose the same replicas for the same requests."""

from __future__ import annotations

import contextlib
from random import Random
from unittest.mock import patch

import pytest

from cluster.errors import MobulaError
from cluster.fleet import GatewaySpec
from cluster.handoff import Token
from cluster.kv import KvCleared, KvLayout, KvNamespace, KvStored, block_hashes
from cluster.performance import PerformanceModel
from cluster.record import TraceRow
from cluster.replica import Load, Membership, Phase, Replica, Role
from cluster.request import Request, SamplingParams
from cluster.slo import Slo
from gateway.dispatch import Dispatcher
from gateway.generation import Generation
from gateway.metrics import GatewayMetrics
from policies.routing import PredictedLatencyRouter
from simulator.flight import Flight
from simulator.gateway import SimulatedGateway
from transports.messages import BlockEvents, Report, Submit, Tokens

SLO = Slo(ttft_s=0.5, tpot_s=0.05)
SPEC = GatewaySpec(allow_anonymous=True, max_queue=8, queue_timeout_s=5.0)
START_S = 1_000_000.0
NAMESPACE = KvNamespace(model="m", dtype="bfloat16")


def rows() -> tuple[Replica, ...]:
    """Two of them prefill, three decode, one does both; not all alike."""
    roles = (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE, Role.DECODE, Role.MIXED)
    return tuple(
        Replica(
            replica_id=f"replica-{number}",
            worker_id=f"worker-{number}",
            node=f"node-{number // 2}",
            endpoint=f"host:{number}",
            role=role,
            phase=Phase.READY,
            model="m",
            engine="emulated",
            host_id=f"node-{number // 2}",
            performance=PerformanceModel(
                step_s=0.006 * (1 + number % 2),
                prefill_token_s=2e-5 if role is Role.PREFILL else 3e-4,
                prefill_pair_s=1e-9,
                sequence_s=3e-5,
                kv_token_s=2e-8,
            ),
            layout=KvLayout(layers=32, kv_heads=8, head_dim=128, dtype="bfloat16"),
            kv_blocks=400,
            context_tokens=6400,
            max_running=6,
            step_budget_tokens=1024,
            ready_since_s=START_S - 100.0 if number else START_S - 5.0,
        )
        for number, role in enumerate(roles)
    )


class Live:
    """A dispatcher whose links write down what they are to send."""

    def __init__(self) -> None:
        self.sent: dict[str, tuple[str, str | None]] = {}
        self._generations: list[Generation] = []
        self.dispatcher = Dispatcher(
            gateway_id="g",
            membership=None,
            transport=None,
            router=PredictedLatencyRouter(),
            spec=SPEC,
            slos={"default": SLO},
            metrics=GatewayMetrics(),
        )
        self.dispatcher._links = self

    def send(self, worker_id: str, message: object) -> None:
        if isinstance(message, Submit):
            source = message.prefill and message.prefill.replica_id
            self.sent[message.request.request_id] = (message.replica_id, source)

    def update(self, membership: Membership) -> None:
        """All are reached."""

    def connected(self, worker_id: str) -> bool:
        return True

    def submit(self, request: Request) -> None:
        generation = Generation(request, None, lambda: None)
        self._generations.append(generation)
        with contextlib.suppress(MobulaError):
            self.dispatcher.submit(generation)

    @property
    def refused(self) -> set[str]:
        """Those that ended without an answer, at once or when another took their place."""
        return {one.request.request_id for one in self._generations if one.failure is not None}


class Simulated:
    """A simulated gateway whose choices are written down."""

    def __init__(self) -> None:
        self.sent: dict[str, tuple[str, str | None]] = {}
        self.refused: set[str] = set()
        self.gateway = SimulatedGateway(
            "g",
            router=PredictedLatencyRouter(),
            spec=SPEC,
            slos={"default": SLO},
            models=["m"],
            send=self._note,
            rejected=lambda flight, why: self.refused.add(flight.request_id),
        )

    def _note(self, flight, route) -> None:
        self.sent[flight.request_id] = (route.decode.replica_id, route.prefill and route.prefill.replica_id)


@pytest.mark.parametrize("seed", range(6))
def test_a_simulated_gateway_chooses_as_the_live_one(seed):
    chance, live, simulated = Random(seed), Live(), Simulated()
    now_s = START_S
    running: dict[str, tuple[Flight, int]] = {}
    families = [tuple(chance.randrange(1000) for _ in range(800)) for _ in range(3)]
    with patch("gateway.dispatch.time.time", lambda: now_s):
        live.dispatcher._adopt(Membership(version=1, replicas=rows()))
        simulated.gateway.adopt(rows(), now_s)
        events = dict.fromkeys((row.replica_id for row in rows()), 0)
        for row in rows():
            live.dispatcher.heard(row.worker_id, BlockEvents(replica_id=row.replica_id, sequence=0, events=(KvCleared(),)))
        for step in range(400):
            now_s += chance.expovariate(60.0)
            what = chance.random()
            if what < 0.5:
                name = str(step)
                own = [chance.randrange(1000) for _ in range(chance.randint(1, 600))]
                prompt = (*chance.choice(families)[: chance.randrange(800)], *own)
                tokens = chance.randint(1, 60)
                request = Request(
                    request_id=name, model="m", prompt=prompt, sampling=SamplingParams(max_tokens=tokens), arrival_s=now_s,
                    tenant=chance.choice(("a", "b")), priority=chance.choice((0, 0, 3)),
                )  # fmt: skip
                trace = TraceRow(
                    arrival_s=now_s,
                    prompt_tokens=len(prompt),
                    output_tokens=tokens,
                    tenant=request.tenant,
                    priority=request.priority,
                )
                flight = Flight(name, trace, tuple(block_hashes(prompt, NAMESPACE)), 0, now_s)
                live.submit(request)
                simulated.gateway.arrive(flight, "m", now_s)
                running[name] = (flight, tokens)
            elif what < 0.7:
                row = chance.choice(rows())
                at_s = now_s - chance.uniform(0.0, 0.03)
                load = Load(
                    replica_id=row.replica_id, sequence=step + 1, at_s=at_s, phase=Phase.READY, running=chance.randrange(5),
                    waiting=chance.randrange(2), waiting_tokens=chance.randrange(900), kv_tokens=chance.randrange(4000),
                    kv_blocks_used=chance.randrange(200),
                )  # fmt: skip
                live.dispatcher.heard(row.worker_id, Report(loads=(load,)))
                simulated.gateway.report(load, now_s)
                simulated.gateway.pump(now_s)
            elif what < 0.8:
                row, family = chance.choice(rows()), chance.choice(families)
                hashes = tuple(block_hashes(family[: 16 * chance.randint(1, 50)], NAMESPACE))
                events[row.replica_id] += 1
                stored = KvStored(parent=None, hashes=hashes, tokens=())
                live.dispatcher.heard(
                    row.worker_id, BlockEvents(replica_id=row.replica_id, sequence=events[row.replica_id], events=(stored,))
                )
                simulated.gateway.stored(row.replica_id, hashes)
            else:
                known = [name for name in running if name in simulated.sent]
                if known:
                    name = chance.choice(known)
                    flight, tokens = running.pop(name)
                    times = (0.0, 0.1, 0.0)
                    first = [Token(request_id=name, attempt=0, index=0, token_id=1, times=times)] if tokens > 1 else []
                    middle = [Token(request_id=name, attempt=0, index=i, token_id=1) for i in range(1, tokens - 1)]
                    last = Token(
                        request_id=name, attempt=0, index=tokens - 1, token_id=1, finish="length", times=None if first else times
                    )
                    live.dispatcher.heard("w", Tokens(replica_id=live.sent[name][0], tokens=(*first, *middle, last)))
                    simulated.gateway.first_token(flight, now_s)
                    simulated.gateway.finished(flight, "m", now_s)
            assert simulated.sent == live.sent
            assert simulated.refused == live.refused
    assert len(live.sent) > 100
    assert {source is not None for _, source in live.sent.values()} == {True, False}
