from __future__ import annotations

import threading

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from cluster.errors import InvalidRequest, Overloaded, ProtocolMismatch, Unreachable
from cluster.handoff import RequestState, Token
from cluster.kv import KvCleared, KvLayout, KvNamespace, KvRemoved, KvStored, block_hashes
from cluster.performance import PerformanceModel
from cluster.request import Request, SamplingParams
from workers.engines import emulated
from workers.engines.emulated import EmulatedEngine
from workers.engines.engine import StepOutput, Submission
from workers.engines.step_driver import ManualDriver, StepDriver

LAYOUT = KvLayout(layers=3, kv_heads=2, head_dim=4, dtype="bfloat16")
PACE = PerformanceModel(
    step_s=2**-7, prefill_token_s=2**-12, prefill_pair_s=2**-20, sequence_s=2**-10, kv_token_s=2**-16,
    idle_w=70.0, prefill_w=700.0, decode_w=400.0,
)  # fmt: skip
UNPACED = PerformanceModel(step_s=0.0, prefill_token_s=0.0)
PROMPT = tuple(range(100, 140))


class Told:
    """What an engine said, with the time it said it."""

    def __init__(self, driver: ManualDriver) -> None:
        self.driver = driver
        self.outputs: list[tuple[float, StepOutput]] = []

    def __call__(self, output: StepOutput) -> None:
        self.outputs.append((self.driver.clock(), output))

    def tokens(self, request_id: str = "a") -> list[Token]:
        return [token for _, output in self.outputs for token in output.tokens if token.request_id == request_id]

    def ids(self, request_id: str = "a") -> list[int | None]:
        return [token.token_id for token in self.tokens(request_id)]

    def times(self, request_id: str = "a") -> list[float]:
        return [at_s for at_s, output in self.outputs for token in output.tokens if token.request_id == request_id]

    def events(self) -> list[object]:
        return [event for _, output in self.outputs for event in output.kv_events]


class Target:
    """A KvExport that keeps what it is given, or fills an import with it."""

    def __init__(self) -> None:
        self.chunks: list[tuple[int, int, np.ndarray]] = []
        self.state: RequestState | None = None
        self.failed: tuple[str, bool] | None = None

    def layer(self, layer: int, first_token: int, kv: np.ndarray) -> None:
        self.chunks.append((layer, first_token, kv))

    def finish(self, state: RequestState) -> None:
        self.state = state

    def fail(self, message: str, retry: bool) -> None:
        self.failed = (message, retry)


def started(driver: ManualDriver | None = None, **settings: object) -> tuple[EmulatedEngine, ManualDriver, Told]:
    driver = driver or ManualDriver()
    chosen = {"performance": PACE, "kv_blocks": 64, "context_tokens": 512, "vocabulary": 1000, "layout": LAYOUT} | settings
    engine = EmulatedEngine(model="m", driver=driver, **chosen)  # type: ignore[arg-type]
    told = Told(driver)
    engine.start(told)
    return engine, driver, told


def request(
    request_id: str = "a", prompt: tuple[int, ...] = PROMPT, priority: int = 0, salt: str = "", **sampling: object
) -> Request:
    params = SamplingParams(**({"max_tokens": 12} | sampling))  # type: ignore[arg-type]
    return Request(request_id=request_id, model="m", prompt=prompt, sampling=params, priority=priority, salt=salt)


def generated(request: Request, **settings: object) -> list[int]:
    engine, driver, told = started(**settings)
    engine.submit(Submission(request=request))
    driver.drain()
    return told.ids(request.request_id)  # type: ignore[return-value]


def test_steps_last_exactly_as_the_performance_model_says() -> None:
    engine, driver, told = started()
    engine.submit(Submission(request=request()))
    driver.drain()
    first_s = PACE.prefill_s(40)
    spans = [PACE.decode_span_s(1, 41, steps) for steps in range(12)]
    assert told.times() == [first_s + span for span in spans]


def test_a_long_prompt_is_computed_in_chunks_beside_decodes_within_the_budget() -> None:
    engine, driver, told = started(step_budget_tokens=16)
    engine.submit(Submission(request=request("a", (1, 2, 3), max_tokens=20)))
    driver.advance(PACE.prefill_s(3))
    engine.submit(Submission(request=request("b", PROMPT)))
    driver.drain()
    # The step under way does not see "b"; the next three each decode "a" and compute 15, 15 and 10 tokens of "b".
    at_s = PACE.prefill_s(3) + PACE.decode_step_s(1, 4)
    for place, (done, count) in enumerate([(0, 15), (15, 15), (30, 10)]):
        at_s += PACE.step_time_s(count, count * done + count * (count + 1) // 2, 1, 5 + place)
    assert told.times("b")[0] == at_s
    assert told.times("a")[4] == at_s


def test_load_shows_power_occupancy_and_counts() -> None:
    engine, driver, _ = started()
    assert engine.load().power_w == 70.0
    engine.submit(Submission(request=request()))
    assert (engine.load().waiting, engine.load().waiting_tokens) == (1, 40)
    driver.advance(PACE.prefill_s(40))
    load = engine.load()
    assert (load.running, load.waiting, load.kv_tokens, load.kv_blocks_used) == (1, 0, 41, 3)
    assert load.power_w == PACE.power_w(0, 0, 1, 41)
    driver.drain()
    load = engine.load()
    assert (load.running, load.kv_tokens, load.kv_blocks_used, load.kv_blocks_cached) == (0, 0, 0, 3)
    assert (load.prompt_tokens, load.output_tokens, load.steps, load.power_w) == (40, 12, 12, 70.0)


def test_an_idle_engine_has_nothing_due() -> None:
    engine, driver, _ = started()
    engine.submit(Submission(request=request()))
    driver.drain()
    assert driver._due == []


@pytest.mark.parametrize("split", range(1, 12))
def test_a_stream_resumed_anywhere_goes_on_token_for_token(split: int) -> None:
    whole = generated(request(seed=7))
    engine, driver, told = started(step_budget_tokens=9)
    engine.submit(Submission(request=request(seed=7), attempt=1, generated=tuple(whole[:split])))
    driver.drain()
    assert told.ids() == whole[split:]
    assert [token.index for token in told.tokens()] == list(range(split, 12))
    assert told.tokens()[-1].finish == "length"


def test_tokens_depend_on_prompt_and_seed_and_on_nothing_else() -> None:
    assert generated(request(seed=1)) == generated(request("b", seed=1, max_tokens=40))[:12]
    assert generated(request(seed=1)) != generated(request(seed=2))
    assert generated(request(seed=1)) != generated(request(prompt=PROMPT[1:], seed=1))
    assert generated(request(seed=1, temperature=0.0)) == generated(request(seed=2, temperature=0.0))


def test_penalties_change_nothing_as_do_temperature_and_top_p() -> None:
    plain = generated(request(seed=3))
    assert generated(request(seed=3, presence_penalty=1.5, repetition_penalty=2.0, top_p=0.1, temperature=0.2)) == plain


def test_text_is_the_token_number_without_a_tokenizer() -> None:
    engine, driver, told = started()
    engine.submit(Submission(request=request()))
    driver.drain()
    assert "".join(token.text for token in told.tokens()) == "".join(f" {token_id}" for token_id in told.ids())


def test_text_comes_from_the_tokenizer_and_special_tokens_never(tmp_path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"Ġone": 0, "Ġtwo": 1, "<end>": 2}, unk_token="Ġone"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    engine, driver, told = started(vocabulary=3, tokenizer_path=str(tmp_path / "tokenizer.json"))
    engine.submit(Submission(request=request(prompt=(0, 1), max_tokens=100)))
    driver.drain()
    words = {0: " one", 1: " two"}
    assert [token.text for token in told.tokens()] == [words[token_id] for token_id in told.ids()]  # type: ignore[index]
    assert set(told.ids()) == {0, 1}


def test_every_id_of_the_tokenizer_is_taken(tmp_path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"Ġone": 0, "Ġtwo": 1, "Ġten": 9}, unk_token="Ġone"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    engine, driver, told = started(vocabulary=2, tokenizer_path=str(tmp_path / "tokenizer.json"))
    assert engine.limits.vocabulary == 10
    engine.submit(Submission(request=request(prompt=(0, 9), max_tokens=100)))
    driver.drain()
    assert set(told.ids()) == {0, 1, 9}


def test_stop_strings_and_stop_ids_end_a_request() -> None:
    whole = generated(request())
    engine, driver, told = started()
    engine.submit(Submission(request=request("a", stop=(f" {whole[3]}",))))
    engine.submit(Submission(request=request("b", stop_token_ids=(whole[5],))))
    driver.drain()
    assert (told.ids("a"), told.tokens("a")[-1].finish, told.tokens("a")[-1].stop_reason) == (whole[:4], "stop", f" {whole[3]}")
    assert (told.ids("b"), told.tokens("b")[-1].finish, told.tokens("b")[-1].stop_reason) == (whole[:6], "stop", whole[5])


def test_a_cached_prefix_is_not_computed_again() -> None:
    engine, driver, told = started()
    engine.submit(Submission(request=request("a")))
    driver.drain()
    began_s = driver.clock()
    engine.submit(Submission(request=request("b")))
    driver.drain()
    assert told.tokens("a")[0].cached_tokens == 0
    assert told.tokens("b")[0].cached_tokens == 32
    assert told.times("b")[0] == pytest.approx(began_s + PACE.prefill_s(40, 32), rel=1e-12)
    assert engine.load().cached_tokens == 32


def test_running_requests_share_blocks_and_other_salts_do_not() -> None:
    engine, driver, _ = started()
    engine.submit(Submission(request=request("a", max_tokens=2)))
    driver.advance(PACE.prefill_s(40))
    engine.submit(Submission(request=request("b", max_tokens=200)))
    engine.submit(Submission(request=request("c", max_tokens=200, salt="other")))
    driver.advance(2**-4)
    assert engine.load().kv_blocks_used == 3 + 3


def test_block_events_tell_what_is_stored_and_evicted() -> None:
    engine, driver, told = started(kv_blocks=6)
    engine.submit(Submission(request=request("a")))
    driver.drain()
    hashes = block_hashes([*PROMPT, *told.ids()], KvNamespace(model="m", dtype="bfloat16"))  # type: ignore[list-item]
    stored = [event for event in told.events() if isinstance(event, KvStored)]
    assert [digest for event in stored for digest in event.hashes] == hashes
    assert engine.cached_blocks()[0] == KvCleared()
    assert [event.hashes[0] for event in engine.cached_blocks()[1:]] == hashes  # type: ignore[union-attr]
    engine.submit(Submission(request=request("b", tuple(range(500, 580)))))
    driver.drain()
    removed = [digest for event in told.events() if isinstance(event, KvRemoved) for digest in event.hashes]
    assert removed == hashes[::-1]


def test_a_request_preempted_for_blocks_loses_no_token() -> None:
    alone = {name: generated(request(name, (seed, 1, 2), max_tokens=60)) for seed, name in enumerate("abc")}
    engine, driver, told = started(kv_blocks=8)
    for seed, name in enumerate("abc"):
        engine.submit(Submission(request=request(name, (seed, 1, 2), max_tokens=60)))
    driver.drain()
    assert {name: told.ids(name) for name in "abc"} == alone
    assert engine.load().preemptions > 0
    assert engine.load().kv_blocks_used == 0


def test_the_lowest_priority_is_preempted_and_the_highest_admitted_first() -> None:
    engine, driver, told = started(max_running=1)
    engine.submit(Submission(request=request("low", priority=0)))
    engine.submit(Submission(request=request("high", priority=1)))
    driver.drain()
    assert told.times("high")[-1] < told.times("low")[0]


def test_abort_frees_at_once_and_says_so_once() -> None:
    engine, driver, told = started()
    engine.submit(Submission(request=request("a", max_tokens=200)))
    engine.submit(Submission(request=request("b", max_tokens=200)))
    driver.advance(0.25)
    engine.abort("a", 0)
    engine.abort("b")
    engine.abort("nobody")
    assert engine.load().kv_blocks_used == 0
    driver.drain()
    for name in "ab":
        finishes = [token.finish for token in told.tokens(name) if token.finish]
        assert (finishes, told.tokens(name)[-1].finish) == (["abort"], "abort")


def test_a_remote_prefill_and_its_decode_equal_one_engine() -> None:
    whole = generated(request())
    driver = ManualDriver()
    source, _, source_told = started(driver, step_budget_tokens=16)
    target, _, told = started(driver)
    reserved = target.reserve(Submission(request=request(), attempt=1))
    assert reserved is not None
    export = Target()
    source.prefill(Submission(request=request()), reserved.cached_tokens, export)
    driver.drain()
    assert [(layer, first, kv.shape) for layer, first, kv in export.chunks] == [
        (layer, first, (2, count, 2, 4)) for first, count in [(0, 16), (16, 16), (32, 8)] for layer in range(3)
    ]
    assert {str(kv.dtype) for _, _, kv in export.chunks} == {"uint16"}
    assert source_told.tokens() == []
    assert source.load().kv_blocks_used == 0
    for chunk in export.chunks:
        reserved.write(*chunk)
    assert export.state is not None
    reserved.commit(export.state, 1)
    driver.drain()
    assert told.ids() == whole
    assert {token.attempt for token in told.tokens()} == {1}
    assert target.load().prompt_tokens == 0


def test_an_import_finds_cached_blocks_and_the_source_skips_them() -> None:
    driver = ManualDriver()
    source, _, _ = started(driver)
    target, _, told = started(driver)
    target.submit(Submission(request=request("before")))
    driver.drain()
    reserved, export = target.reserve(Submission(request=request())), Target()
    assert reserved is not None
    assert reserved.cached_tokens == 32
    source.prefill(Submission(request=request()), 32, export)
    driver.drain()
    assert [(first, kv.shape[1]) for _, first, kv in export.chunks] == [(32, 8)] * 3
    for chunk in export.chunks:
        reserved.write(*chunk)
    reserved.commit(export.state, 0)  # type: ignore[arg-type]
    driver.drain()
    assert told.ids() == told.ids("before")


def test_a_decoding_request_moves_whole() -> None:
    whole = generated(request())
    driver = ManualDriver()
    source, _, source_told = started(driver)
    target, _, told = started(driver)
    source.submit(Submission(request=request()))
    driver.advance(PACE.prefill_s(40) + PACE.decode_span_s(1, 41, 4))
    shown, export = source_told.ids(), Target()
    source.export_running("a", 0, export)
    driver.drain()
    reserved = target.reserve(Submission(request=request(), generated=tuple(shown)))  # type: ignore[arg-type]
    assert reserved is not None
    for chunk in export.chunks:
        reserved.write(*chunk)
    reserved.commit(export.state, 1)  # type: ignore[arg-type]
    driver.drain()
    assert source_told.ids() == shown == whole[:5]
    assert told.ids() == whole[5:]
    assert source.load().kv_blocks_used == target.load().kv_blocks_used == 0


def test_exporting_what_does_not_decode_here_fails_the_export() -> None:
    engine, driver, _ = started()
    export = Target()
    engine.export_running("a", 0, export)
    driver.drain()
    assert export.failed == ("request a attempt 0 is not decoding here", True)


def test_an_import_refuses_what_does_not_fit_and_incomplete_kv() -> None:
    engine, _, _ = started()
    reserved = engine.reserve(Submission(request=request()))
    assert reserved is not None
    with pytest.raises(ProtocolMismatch, match="layer 3 outside"):
        reserved.write(3, 0, np.zeros((2, 1, 2, 4), np.uint16))
    with pytest.raises(ProtocolMismatch, match="float32, expected"):
        reserved.write(0, 0, np.zeros((2, 1, 2, 4), np.float32))
    with pytest.raises(ProtocolMismatch, match=r"outside \[0, 51\)"):
        reserved.write(0, 50, np.zeros((2, 2, 2, 4), np.uint16))
    with pytest.raises(ProtocolMismatch, match="KV of token 0 in layer 0 never came"):
        reserved.commit(RequestState(request=request(), generated=(5,)), 0)
    reserved.abort()
    reserved.abort()
    assert engine.load().kv_blocks_used == 0
    with pytest.raises(Unreachable):
        reserved.write(0, 0, np.zeros((2, 1, 2, 4), np.uint16))


def test_reserving_without_room_gives_nothing() -> None:
    engine, _, _ = started(kv_blocks=4)
    assert engine.reserve(Submission(request=request("a"))) is not None
    assert engine.reserve(Submission(request=request("b"))) is None


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"max_tokens": 500}, "prompt 40 plus max_tokens 500 above 512, the context of m"),
        ({"prompt": ()}, "an empty prompt"),
        ({"prompt": (1000,)}, r"token id 1000 outside \[0, 1000\)"),
        ({"logprobs": 0}, "no log-probabilities"),
        ({"temperature": 3.0}, "temperature 3.0 is outside"),
    ],
)
def test_what_cannot_be_served_is_refused(fault: dict[str, object], words: str) -> None:
    engine, _, _ = started()
    with pytest.raises(InvalidRequest, match=words):
        engine.submit(Submission(request=request(**fault)))  # type: ignore[arg-type]


def test_the_queue_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated, "MAX_WAITING", 2)
    engine, _, _ = started()
    engine.submit(Submission(request=request("a")))
    engine.submit(Submission(request=request("b")))
    with pytest.raises(Overloaded, match="2 requests wait"):
        engine.submit(Submission(request=request("c")))


def test_stopping_fails_everything_with_retry() -> None:
    engine, driver, told = started()
    export = Target()
    engine.submit(Submission(request=request("a", max_tokens=200)))
    engine.prefill(Submission(request=request("b")), 0, export)
    driver.advance(2**-8)
    engine.stop()
    engine.stop()
    driver.drain()
    assert (told.tokens()[-1].finish, told.tokens()[-1].retry) == ("error", True)
    assert export.failed == ("the engine stopped", True)
    with pytest.raises(Unreachable):
        engine.submit(Submission(request=request("c")))


def test_an_export_that_raises_fails_its_own_request_only() -> None:
    class Broken(Target):
        def layer(self, layer: int, first_token: int, kv: np.ndarray) -> None:
            raise OSError("gone")

    engine, driver, told = started()
    export = Broken()
    engine.prefill(Submission(request=request("b")), 0, export)
    engine.submit(Submission(request=request("a")))
    driver.drain()
    assert export.failed == ("KV export failed at token 0: gone", True)
    assert export.state is None
    assert len(told.ids()) == 12


def test_a_late_driver_counts_overruns_and_does_not_add_up_small_delays() -> None:
    engine, driver, told = started()
    engine.submit(Submission(request=request()))
    driver.advance(PACE.prefill_s(40))
    driver.now_s += 10.0
    driver.drain()
    assert engine.load().overrun_steps == 1
    late = [msgspec.structs.asdict(token)["index"] for token in told.tokens()]
    assert late == list(range(12))


def test_an_engine_whose_books_break_ends_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, driver, told = started()
    monkeypatch.setattr(engine, "_plan", lambda *_: 1 / 0)
    engine.submit(Submission(request=request()))
    driver.drain()
    assert [(token.finish, token.error, token.retry) for token in told.tokens()] == [("error", "the engine stopped", True)]
    assert not engine.alive


def test_one_thread_steps_many_engines() -> None:
    driver = StepDriver()
    ended = threading.Semaphore(0)
    threads: set[int] = set()

    def sink(output: StepOutput) -> None:
        threads.add(threading.get_ident())
        for token in output.tokens:
            if token.finish == "length":
                ended.release()

    engines = [
        EmulatedEngine(model="m", driver=driver, performance=UNPACED, kv_blocks=64, context_tokens=512, vocabulary=1000)
        for _ in range(20)
    ]
    for engine in engines:
        engine.start(sink)
        engine.submit(Submission(request=request()))
    for _ in engines:
        assert ended.acquire(timeout=30)
    driver.close()
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_a_call_that_raises_does_not_stop_the_driver() -> None:
    driver, ran = StepDriver(), threading.Event()
    driver.call_at(0.0, lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    driver.call_at(driver.clock(), ran.set)
    assert ran.wait(30)
    driver.close()
