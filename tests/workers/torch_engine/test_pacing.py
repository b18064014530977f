"""Paced steps last as long as emulated, and measured ones are fitted."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest

from cluster.performance import PerformanceModel
from tests.workers.torch_engine.tiny import prompt, request
from workers.engines.torch_engine.attention import Span
from workers.engines.torch_engine.pacing import Pacer, StepShape, fitted, shape_of

SHAPES = [StepShape(p, p * p // 2, b, 100 * b) for p, b in itertools.product((0, 16, 64, 512), (0, 1, 4))] + [
    StepShape(0, 0, 4, 4000)
]


def test_a_fit_finds_what_made_the_steps():
    made = PerformanceModel(step_s=2e-3, prefill_token_s=1e-5, prefill_pair_s=1e-8, sequence_s=1e-4, kv_token_s=1e-6)
    found = fitted([(shape, made.step_time_s(*shape)) for shape in SHAPES])
    for shape in SHAPES:
        assert found.step_time_s(*shape) == pytest.approx(made.step_time_s(*shape), rel=1e-6)


def test_a_fit_of_noise_has_no_negative_part():
    noise = np.random.default_rng(0).uniform(1e-3, 5e-3, len(SHAPES))
    found = fitted(list(zip(SHAPES, noise.tolist(), strict=True)))
    assert found.step_s > 0
    assert min(found.prefill_token_s, found.prefill_pair_s, found.sequence_s, found.kv_token_s) >= 0


def test_the_shape_of_a_step_counts_pairs_as_causal():
    table = np.arange(10)
    assert shape_of([Span(table, 9, 1), Span(table, 0, 4), Span(table, 4, 2)]) == StepShape(6, 10 + 11, 1, 10)


def test_steps_in_a_row_last_from_end_to_end_and_after_a_rest_from_their_beginning(monkeypatch):
    clock = [0.0]
    stopped = threading.Event()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stopped, "wait", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    pacer, ends = Pacer(PerformanceModel(step_s=10.0, prefill_token_s=0.0)), []
    for between_s, computing_s in ((0.0, 4.0), (1.0, 4.0), (1.0, 12.0), (1.0, 4.0)):
        clock[0] += between_s
        began_s = clock[0]
        clock[0] += computing_s
        pacer.hold(StepShape(0, 0, 1, 1), began_s, stopped)
        ends.append(clock[0])
    assert ends == [10.0, 20.0, 33.0, 43.0]
    assert pacer.overruns == 1
    pacer.rest()
    clock[0] += 5.0
    pacer.hold(StepShape(0, 0, 1, 1), clock[0], stopped)
    assert clock[0] == 58.0


def test_a_paced_engine_waits_and_counts_what_came_too_late(stepped, monkeypatch):
    waits: list[float] = []
    slow = stepped(pace=PerformanceModel(step_s=1000.0, prefill_token_s=0.0))
    monkeypatch.setattr(slow.engine._stopped, "wait", waits.append)
    slow.generate(request(prompt(20), 5))
    assert len(waits) == 5
    assert 900 < min(waits) <= max(waits) <= 1000
    assert slow.engine.load().overrun_steps == 0
    fast = stepped(pace=PerformanceModel(step_s=1e-9, prefill_token_s=0.0))
    fast.generate(request(prompt(20), 5))
    assert fast.engine.load().overrun_steps == 5
