"""What every engine promises, whatever computes its tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cluster.errors import InvalidRequest, MobulaError
from cluster.handoff import RequestState, Token
from cluster.kv import KvCleared, KvLayout, KvStored
from cluster.performance import PerformanceModel
from cluster.request import Request, SamplingParams
from tests.workers.torch_engine.tiny import CONFIGS, save_model
from workers.engines.emulated import EmulatedEngine
from workers.engines.engine import Engine, StepOutput, Submission
from workers.engines.step_driver import StepDriver
from workers.engines.torch_engine.engine import TorchEngine

WAIT_S = 30.0  # For events that come in milliseconds; only a broken engine waits so long.


def _torch(folder: Path) -> Engine:
    path = folder if (folder / "config.json").exists() else save_model(CONFIGS["llama"], folder)
    return TorchEngine(path=str(path), model="tiny", kv_blocks=256, step_budget_tokens=64)


def _emulated(folder: Path) -> Engine:
    return EmulatedEngine(
        model="tiny",
        performance=PerformanceModel(step_s=5e-4, prefill_token_s=1e-5, sequence_s=1e-5),
        kv_blocks=256,
        step_budget_tokens=64,
        context_tokens=4096,
        vocabulary=256,
        layout=KvLayout(layers=2, kv_heads=2, head_dim=8),
        driver=DRIVER,
    )


DRIVER = StepDriver()

ENGINES: dict[str, Callable[[Path], Engine]] = {
    "torch": _torch,
    "emulated": _emulated,
}


class Heard:
    """A sink that can be waited for."""

    def __init__(self) -> None:
        self.outputs: list[StepOutput] = []
        self._news = threading.Condition()

    def __call__(self, output: StepOutput) -> None:
        with self._news:
            self.outputs.append(output)
            self._news.notify_all()

    def of(self, request_id: str) -> list[Token]:
        return [token for output in list(self.outputs) for token in output.tokens if token.request_id == request_id]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._news:
            assert self._news.wait_for(condition, WAIT_S)

    def finished(self, request_id: str) -> list[Token]:
        self.wait_for(lambda: any(token.finish for token in self.of(request_id)))
        return self.of(request_id)


class Carrier:
    """A KvExport that keeps what it is given."""

    def __init__(self) -> None:
        self.layers: list[tuple[int, int, np.ndarray]] = []
        self.state: RequestState | None = None
        self.failure: tuple[str, bool] | None = None
        self.ended = threading.Event()

    def layer(self, layer: int, first_token: int, kv: np.ndarray) -> None:
        self.layers.append((layer, first_token, kv))

    def finish(self, state: RequestState) -> None:
        self.state = state
        self.ended.set()

    def fail(self, message: str, retry: bool) -> None:
        self.failure = (message, retry)
        self.ended.set()


@pytest.fixture(scope="module", params=ENGINES)
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Engine]:
    folder = tmp_path_factory.mktemp(request.param)
    return lambda: ENGINES[request.param](folder)


@pytest.fixture
def started(make: Callable[[], Engine]) -> Iterator[Callable[[], tuple[Engine, Heard]]]:
    engines: list[Engine] = []

    def start() -> tuple[Engine, Heard]:
        engine, heard = make(), Heard()
        engine.start(heard)
        engines.append(engine)
        return engine, heard

    yield start
    for engine in engines:
        engine.stop()


def asked(name: str, length: int = 40, max_tokens: int = 12, **sampling: object) -> Submission:
    options = {"temperature": 0.0, "ignore_eos": True, **sampling}
    prompt = tuple((7 * i + length) % 250 for i in range(length))
    return Submission(
        request=Request(request_id=name, model="tiny", prompt=prompt, sampling=SamplingParams(max_tokens=max_tokens, **options))
    )


def test_each_index_comes_once_and_one_finish_last(started):
    engine, heard = started()
    names = [f"r{i}" for i in range(5)]
    for i, name in enumerate(names):
        engine.submit(asked(name, length=10 + 30 * i))
    for name in names:
        tokens = heard.finished(name)
        assert [token.index for token in tokens] == list(range(12))
        assert [token.finish for token in tokens] == [None] * 11 + ["length"]


def test_a_resumed_request_goes_on_with_the_same_tokens(started):
    engine, heard = started()
    engine.submit(asked("whole"))
    whole = [token.token_id for token in heard.finished("whole")]
    submission = Submission(request=asked("rest").request, attempt=2, generated=tuple(whole[:5]))
    engine.submit(submission)
    rest = heard.finished("rest")
    assert [(token.index, token.attempt, token.token_id) for token in rest] == [(i, 2, whole[i]) for i in range(5, 12)]


def test_abort_ends_with_exactly_one_finish_and_frees(started):
    engine, heard = started()
    engine.submit(asked("long", max_tokens=2000))
    heard.wait_for(lambda: len(heard.of("long")) >= 2)
    engine.abort("long")
    engine.abort("long", 0)
    heard.finished("long")
    engine.submit(asked("after"))
    heard.finished("after")
    assert [token.finish for token in heard.of("long") if token.finish] == ["abort"]
    assert engine.load().kv_blocks_used == 0


def test_counters_agree_with_what_was_asked_and_told(started):
    engine, heard = started()
    assert engine.load().running == engine.load().waiting == engine.load().steps == 0
    for i in range(3):
        engine.submit(asked(f"r{i}", length=33 + i))
    for i in range(3):
        heard.finished(f"r{i}")
    load = engine.load()
    assert (load.running, load.waiting, load.waiting_tokens, load.kv_tokens, load.kv_blocks_used) == (0, 0, 0, 0, 0)
    assert load.output_tokens == 36
    assert load.prompt_tokens + load.cached_tokens == 33 + 34 + 35
    assert load.steps >= 12
    assert load.preemptions == 0


def test_what_is_past_its_deadline_is_not_begun_and_what_has_begun_goes_on(started):
    engine, heard = started()
    whole = asked("whole")
    engine.submit(whole)
    tokens = [token.token_id for token in heard.finished("whole")]
    past = msgspec.structs.replace(whole.request, deadline_s=time.time() - 5.0)
    computed = engine.load().prompt_tokens
    carrier = Carrier()
    engine.submit(Submission(request=msgspec.structs.replace(past, request_id="late")))
    [token] = heard.finished("late")
    assert (token.finish, token.retry) == ("error", False)
    assert "request late is 5." in token.error
    engine.prefill(Submission(request=msgspec.structs.replace(past, request_id="late")), 0, carrier)
    assert carrier.ended.wait(WAIT_S)
    assert "past its deadline" in carrier.failure[0]
    assert not carrier.failure[1]
    assert engine.load().prompt_tokens == computed
    engine.submit(Submission(request=msgspec.structs.replace(past, request_id="rest"), attempt=1, generated=tuple(tokens[:5])))
    assert [token.token_id for token in heard.finished("rest")] == tokens[5:]


def test_what_cannot_fit_is_refused_with_the_bound(started):
    engine, _ = started()
    limit = engine.limits.context_tokens
    with pytest.raises(InvalidRequest, match=str(limit)):
        engine.submit(asked("huge", max_tokens=limit))
    with pytest.raises(InvalidRequest):
        engine.submit(asked("hot", temperature=9.0))


def test_events_and_picture_tell_the_same_blocks(started):
    engine, heard = started()
    engine.submit(asked("r", length=70))
    heard.finished("r")
    told = {h for output in heard.outputs for event in output.kv_events if isinstance(event, KvStored) for h in event.hashes}
    first, *rest = engine.cached_blocks()
    assert first == KvCleared()
    assert {h for event in rest for h in event.hashes} == told
    assert len(told) >= 70 // engine.limits.block_tokens


def test_a_prefilled_request_decodes_elsewhere_with_the_same_tokens(started):
    (source, silent), (target, heard) = started(), started()
    if not source.capabilities.kv_blocks:
        pytest.skip("moves KV by itself")
    target.submit(asked("alone"))
    expected = [token.token_id for token in heard.finished("alone")]
    submission, carrier = Submission(request=asked("moved").request, attempt=1), Carrier()
    place = target.reserve(submission)
    source.prefill(submission, place.cached_tokens, carrier)
    assert carrier.ended.wait(WAIT_S)
    for layer in carrier.layers:
        place.write(*layer)
    place.commit(carrier.state, 1)
    assert [(token.index, token.token_id) for token in heard.finished("moved")] == list(enumerate(expected))
    assert silent.of("moved") == []


def test_a_running_request_moves_whole(started):
    (source, before), (target, after) = started(), started()
    if not source.capabilities.live_export:
        pytest.skip("cannot hand over a running request")
    submission, carrier = asked("moved", max_tokens=400), Carrier()
    target.submit(asked("alone", max_tokens=400))
    source.submit(submission)
    before.wait_for(lambda: len(before.of("moved")) >= 3)
    source.export_running("moved", 0, carrier)
    assert carrier.ended.wait(WAIT_S)
    place = target.reserve(Submission(request=submission.request, attempt=1, generated=carrier.state.generated))
    for layer in carrier.layers:
        place.write(*layer)
    place.commit(carrier.state, 1)
    tokens = before.of("moved") + after.finished("moved")
    assert [token.index for token in tokens] == list(range(400))
    assert [token.token_id for token in tokens] == [token.token_id for token in after.finished("alone")]


def test_an_aborted_reservation_leaves_nothing(started):
    engine, _ = started()
    if not engine.capabilities.kv_blocks:
        pytest.skip("moves KV by itself")
    place = engine.reserve(asked("r"))
    assert engine.load().kv_blocks_used > 0
    place.abort()
    place.abort()
    assert engine.load().kv_blocks_used == 0


def test_a_sink_that_raises_stops_no_step(make):
    engine, heard, refused = make(), Heard(), []

    def moody(output: StepOutput) -> None:
        heard(output)
        if not refused:
            refused.append(output)
            raise OSError("nobody listens")

    engine.start(moody)
    engine.submit(asked("r"))
    assert [token.index for token in heard.finished("r")] == list(range(12))
    assert engine.alive
    engine.stop()
    assert not engine.alive


def test_stop_fails_what_runs_with_retry(started):
    engine, heard = started()
    carrier = Carrier()
    engine.submit(asked("running", max_tokens=3000))
    heard.wait_for(lambda: len(heard.of("running")) >= 1)
    engine.prefill(asked("prefilling", length=1000), 0, carrier)
    engine.stop()
    engine.stop()
    last = heard.of("running")[-1]
    assert (last.finish, last.retry) == ("error", True)
    assert carrier.ended.is_set()
    assert carrier.state is not None or carrier.failure[1]
    with pytest.raises(MobulaError):
        engine.submit(asked("late"))


def test_abandoning_fails_what_runs_with_retry_and_serves_on(started):
    engine, heard = started()
    carrier = Carrier()
    engine.submit(asked("running", max_tokens=3000))
    heard.wait_for(lambda: len(heard.of("running")) >= 1)
    engine.prefill(asked("prefilling", length=1000), 0, carrier)
    engine.abandon("the replica changes its role")
    last = heard.finished("running")[-1]
    assert (last.finish, last.error, last.retry) == ("error", "the replica changes its role", True)
    assert carrier.ended.wait(WAIT_S)
    assert carrier.state is not None or carrier.failure[1]
    assert engine.alive
    engine.submit(asked("after"))
    assert len(heard.finished("after")) == 12
    assert engine.load().kv_blocks_used == 0


def test_slowed_engine_says_that_its_steps_last_longer_and_the_same_tokens(started):
    engine, heard = started()
    engine.submit(asked("before", max_tokens=100))
    tokens = [token.token_id for token in heard.finished("before")]
    engine.slow(20.0)
    engine.submit(asked("slowed", max_tokens=100))
    assert [token.token_id for token in heard.finished("slowed")] == tokens
    slowed_s = engine.load().step_s
    engine.slow(1.0)
    engine.submit(asked("healed", max_tokens=100))
    heard.finished("healed")
    assert engine.load().step_s < slowed_s
