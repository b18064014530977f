"""Whatever is asked of engines in whatever order: each request ends once, with the model's tokens, and no block is lost."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.errors import Overloaded
from cluster.handoff import RequestState
from cluster.kv import KvLayout
from cluster.performance import PerformanceModel
from cluster.request import Request
from tests.workers.torch_engine.tiny import CONFIGS, Stepped, prompt, request, save_model
from workers.engines.block_pool import BlockPool
from workers.engines.emulated import EmulatedEngine
from workers.engines.engine import KvImport, StepOutput, Submission
from workers.engines.step_driver import ManualDriver

TIGHT = {"kv_blocks": 14, "block_tokens": 4, "max_running": 4, "step_budget_tokens": 9}
STEM = prompt(24)


class Torch(Stepped):
    """The torch engine, stepped by the test."""

    def __init__(self, **options: object) -> None:
        super().__init__(model(), **options)

    def step(self) -> None:
        self.engine.step()

    def books(self) -> tuple[BlockPool, list[list[int]], int]:
        """The pool, the blocks of each request that runs, and the places kept for reservations."""
        scheduler = self.engine._scheduler
        assert not any(sequence.blocks for sequence in scheduler.waiting)
        return self.engine._pool, [sequence.blocks for sequence in scheduler.running], scheduler.reserved


class Emulated:
    """The emulated engine, its time passing only in steps."""

    def __init__(self, **options: object) -> None:
        self.outputs: list[StepOutput] = []
        self.driver = ManualDriver()
        self.engine = EmulatedEngine(
            model="tiny",
            performance=PerformanceModel(step_s=1.0, prefill_token_s=0.0),
            context_tokens=4096,
            vocabulary=300,
            layout=KvLayout(layers=2, kv_heads=1, head_dim=2, block_tokens=4),
            driver=self.driver,
            **{"kv_blocks": 256, **options},
        )
        self.engine.start(self.outputs.append)

    tokens = Stepped.tokens
    of, ids, submit, generate = Stepped.of, Stepped.ids, Stepped.submit, Stepped.generate

    def step(self) -> None:
        self.driver.advance(1.0)

    def drain(self) -> None:
        self.driver.drain()

    def books(self) -> tuple[BlockPool, list[list[int]], int]:
        engine = self.engine
        assert not any(sequence.blocks for sequence in engine._waiting)
        return engine._pool, [each.blocks for each in (*engine._decoding, *engine._prefilling)], engine._reserved


KINDS = {"torch": Torch, "emulated": Emulated}

lengths = st.integers(1, 24)
engines = st.integers(0, 1)
pick = st.integers(0, 10**6)


@cache
def model() -> Path:
    return save_model(CONFIGS["llama"], Path(mkdtemp()) / "llama")


@cache
def alone(kind: str, tokens: tuple[int, ...], max_tokens: int) -> list[int]:
    """What such an engine says to a prompt."""
    return KINDS[kind](block_tokens=4).generate(request(list(tokens), max_tokens))[0]


class Moving:
    """A request's way from one engine to another: its KV as it comes, and then its state or the word that it failed."""

    def __init__(self, asked: Request, attempt: int) -> None:
        self.request, self.attempt = asked, attempt
        self.layers: list[tuple[int, int, np.ndarray]] = []
        self.state: RequestState | None = None
        self.failed = False

    def layer(self, layer: int, first_token: int, kv: np.ndarray) -> None:
        self.layers.append((layer, first_token, kv))

    def finish(self, state: RequestState) -> None:
        self.state = state

    def fail(self, message: str, retry: bool) -> None:
        self.failed = True


class Conservation(RuleBasedStateMachine):
    """Two engines with too few blocks. Prompts begin alike, so that prefixes are shared; each attempt has its own number."""

    kind: str

    def __init__(self) -> None:
        super().__init__()
        self.engines = [KINDS[self.kind](**TIGHT) for _ in range(2)]
        self.asked: dict[str, Request] = {}
        self.attempts = 0
        self.live: list[tuple[int, str, int]] = []
        """Engine, request and attempt of what was submitted somewhere or moved there."""
        self.moving: list[Moving] = []
        self.reserved: list[tuple[int, KvImport]] = []

    def new(self, length: int, odd: int, max_tokens: int, priority: int) -> Request:
        tokens = [*STEM[: length - 1], odd]
        asked = request(tokens, max_tokens, request_id=f"r{len(self.asked)}", priority=priority)
        self.asked[asked.request_id] = asked
        return asked

    def alone(self, asked: Request) -> list[int]:
        return alone(self.kind, asked.prompt, asked.sampling.max_tokens)

    def next_attempt(self) -> int:
        self.attempts += 1
        return self.attempts

    def said(self, request_id: str) -> list[int]:
        tokens = {
            token.index: token.token_id for each in self.engines for token in each.of(request_id) if token.token_id is not None
        }
        assert sorted(tokens) == list(range(len(tokens)))
        return [tokens[index] for index in sorted(tokens)]

    @rule(where=engines, length=lengths, odd=st.integers(0, 2), max_tokens=st.integers(1, 24), priority=st.integers(0, 1))
    def submit(self, where: int, length: int, odd: int, max_tokens: int, priority: int) -> None:
        asked, attempt = self.new(length, odd, max_tokens, priority), self.next_attempt()
        self.engines[where].engine.submit(Submission(request=asked, attempt=attempt))
        self.live.append((where, asked.request_id, attempt))

    @rule(where=engines, length=lengths, odd=st.integers(0, 2), max_tokens=st.integers(1, 24))
    def prefill(self, where: int, length: int, odd: int, max_tokens: int) -> None:
        moving = Moving(self.new(length, odd, max_tokens, 0), self.next_attempt())
        self.engines[where].engine.prefill(Submission(request=moving.request, attempt=moving.attempt), 0, moving)
        self.moving.append(moving)

    @rule(where=engines, steps=st.integers(1, 8))
    def step(self, where: int, steps: int) -> None:
        for _ in range(steps):
            self.engines[where].step()

    @rule(which=pick)
    def abort(self, which: int) -> None:
        if self.live:
            where, request_id, attempt = self.live[which % len(self.live)]
            self.engines[where].engine.abort(request_id, attempt)

    @rule(which=pick)
    def export(self, which: int) -> None:
        """Take out whatever state it is in; a request that is not decoding stays."""
        if not self.live:
            return
        where, request_id, attempt = self.live[which % len(self.live)]
        moving = Moving(self.asked[request_id], attempt)
        self.engines[where].engine.export_running(request_id, attempt, moving)
        self.engines[where].step()
        assert moving.failed == (moving.state is None)
        if moving.state is not None:
            assert list(moving.state.generated) == self.said(request_id)
            self.live.remove((where, request_id, attempt))
            self.moving.append(moving)

    @rule(where=engines, which=pick)
    def bring(self, where: int, which: int) -> None:
        """Whole KV into blocks reserved for it, or computed again where there are none."""
        ready = [each for each in self.moving if each.state is not None]
        if not ready:
            return
        moving = ready[which % len(ready)]
        assert moving.state is not None
        self.moving.remove(moving)
        attempt, target = self.next_attempt(), self.engines[where].engine
        shown = () if moving.state.first is not None else moving.state.generated
        submission = Submission(request=moving.request, attempt=attempt, generated=shown)
        self.live.append((where, moving.request.request_id, attempt))
        place = target.reserve(submission)
        try:
            if place is None:
                target.submit(submission)
                return
            for layer in moving.layers:
                place.write(*layer)
            place.commit(moving.state, attempt)
        except Overloaded:
            place.abort()
            target.submit(submission)

    @rule(where=engines, length=lengths, max_tokens=st.integers(1, 24))
    def reserve(self, where: int, length: int, max_tokens: int) -> None:
        asked = request(STEM[:length], max_tokens)
        place = self.engines[where].engine.reserve(Submission(request=asked))
        if place is not None:
            self.reserved.append((where, place))

    @rule(which=pick)
    def give_back(self, which: int) -> None:
        if self.reserved:
            self.reserved.pop(which % len(self.reserved))[1].abort()

    @invariant()
    def every_block_is_held_by_those_who_know(self) -> None:
        for where, each in enumerate(self.engines):
            pool, running, reserved = each.books()
            assert reserved == sum(place == where for place, _ in self.reserved)
            assert len(running) + reserved <= TIGHT["max_running"]
            holders = Counter(block for blocks in running for block in blocks)
            assert pool.used == len(+pool._holders)
            assert holders <= pool._holders
            if not reserved:
                assert holders == +pool._holders

    def teardown(self) -> None:
        for _, place in self.reserved:
            place.abort()
        for each in self.engines:
            each.drain()
            load = each.engine.load()
            assert (load.running, load.waiting, load.kv_blocks_used) == (0, 0, 0)
        for where, request_id, attempt in self.live:
            tokens = [token for token in self.engines[where].of(request_id) if token.attempt == attempt]
            assert [token.finish is not None for token in tokens] == [False] * (len(tokens) - 1) + [True]
            expected, said = self.alone(self.asked[request_id]), self.said(request_id)
            assert said == (expected[: len(said)] if tokens[-1].finish == "abort" else expected)
        assert all(each.state is not None or each.failed for each in self.moving)
        for each in self.engines:
            each.engine.stop()


class TorchConservation(Conservation):
    kind = "torch"


class EmulatedConservation(Conservation):
    kind = "emulated"


TestTorch, TestEmulated = TorchConservation.TestCase, EmulatedConservation.TestCase
TestTorch.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)
TestEmulated.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
