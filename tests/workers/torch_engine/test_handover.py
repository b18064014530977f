"""A request handed over goes on with the tokens it would have had."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.errors import ProtocolMismatch, Unreachable
from cluster.handoff import RequestState
from tests.workers.torch_engine.tiny import EOS, prompt, request
from workers.engines.engine import Submission


class Carrier:
    """A KvExport that keeps what it is given."""

    def __init__(self) -> None:
        self.layers: list[tuple[int, int, np.ndarray]] = []
        self.state: RequestState | None = None
        self.failure: tuple[str, bool] | None = None

    def layer(self, layer: int, first_token: int, kv: np.ndarray) -> None:
        self.layers.append((layer, first_token, kv))

    def finish(self, state: RequestState) -> None:
        self.state = state

    def fail(self, message: str, retry: bool) -> None:
        self.failure = (message, retry)


def hand_over(carrier: Carrier, target, submission: Submission) -> None:
    """Reserve, write, commit; what `reserve` found is left out of the write, as a sender would."""
    place = target.engine.reserve(submission)
    for layer, first, kv in carrier.layers:
        place.write(layer, first, kv)
    place.commit(carrier.state, submission.attempt)


SAMPLINGS = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "top_p": 0.95, "seed": 11, "repetition_penalty": 1.2, "logprobs": 3},
}


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_prefilled_here_and_decoded_there_gives_the_same_tokens(name, sampling, model_paths, stepped):
    asked = request(prompt(75), 20, **SAMPLINGS[sampling])
    alone = stepped(model_paths[name])
    expected = alone.generate(asked)[0]
    source, target = stepped(model_paths[name], step_budget_tokens=32), stepped(model_paths[name])
    carrier = Carrier()
    source.engine.prefill(Submission(request=asked), 0, carrier)
    source.drain()
    hand_over(carrier, target, Submission(request=asked, attempt=3))
    target.drain()
    assert source.tokens == []
    assert target.ids(asked.request_id) == expected
    assert [token.text for token in target.tokens] == [token.text for token in alone.tokens]
    assert {token.attempt for token in target.tokens} == {3}
    assert source.engine.load().kv_blocks_used == target.engine.load().kv_blocks_used == 0


def test_a_layer_leaves_before_the_next_is_computed(stepped, monkeypatch):
    engine = stepped()
    order: list[str] = []

    class Watching(Carrier):
        def layer(self, layer: int, first_token: int, kv: np.ndarray) -> None:
            order.append(f"sent {layer}")

    for index, layer in enumerate(engine.engine._model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: order.append(f"computed {index}"))
    engine.engine.prefill(Submission(request=request(prompt(20), 4)), 0, Watching())
    engine.drain()
    assert order == ["sent 0", "computed 0", "sent 1", "computed 1"]


def test_tokens_the_receiver_has_are_skipped_and_cached_ones_sent(stepped):
    source = stepped()
    source.generate(request(prompt(64), 1))
    carrier = Carrier()
    source.engine.prefill(Submission(request=request(prompt(64) + prompt(9, seed=1), 4)), 32, carrier)
    source.drain()
    assert [(layer, first, kv.shape) for layer, first, kv in carrier.layers] == [(0, 32, (2, 41, 2, 16)), (1, 32, (2, 41, 2, 16))]


def test_imported_blocks_are_shared_after_commit_and_skipped_by_the_next(stepped):
    source, target = stepped(), stepped()
    for tail in (1, 2):
        asked = request(prompt(64) + prompt(9, seed=tail), 6)
        carrier = Carrier()
        place = target.engine.reserve(Submission(request=asked))
        assert place.cached_tokens == (0 if tail == 1 else 64)
        source.engine.prefill(Submission(request=asked), place.cached_tokens, carrier)
        source.drain()
        for layer in carrier.layers:
            place.write(*layer)
        place.commit(carrier.state, 0)
        target.drain()
        assert target.ids(asked.request_id) == stepped().generate(asked)[0]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_decoding_request_moves_mid_stream(sampling, stepped):
    asked = request(prompt(40), 30, **SAMPLINGS[sampling])
    expected = stepped().generate(asked)[0]
    source, target, carrier = stepped(), stepped(), Carrier()
    source.submit(asked)
    for _ in range(12):
        source.engine.step()
    source.engine.export_running(asked.request_id, 0, carrier)
    source.drain()
    assert source.ids(asked.request_id) == expected[:12]
    # Reserved with fewer tokens than were generated in the end: the blocks grow with the KV.
    hand_over(carrier, target, Submission(request=asked, attempt=1, generated=tuple(expected[:3])))
    target.drain()
    assert target.ids(asked.request_id) == expected[12:]
    assert source.engine.load().kv_blocks_used == 0


def test_a_first_token_that_ends_the_request_is_passed_on(stepped):
    asked = request(prompt(20), 1)
    source, target, carrier = stepped(), stepped(), Carrier()
    source.engine.prefill(Submission(request=asked), 0, carrier)
    source.drain()
    hand_over(carrier, target, Submission(request=asked))
    target.drain()
    assert [token.finish for token in target.tokens] == ["length"]
    assert target.engine.load().kv_blocks_used == 0


def test_a_first_token_is_told_before_any_step(stepped):
    asked = request(prompt(20), 8)
    expected = stepped().generate(asked)[0]
    source, target, carrier = stepped(), stepped(), Carrier()
    source.engine.prefill(Submission(request=asked), 0, carrier)
    source.drain()
    hand_over(carrier, target, Submission(request=asked))
    assert target.ids(asked.request_id) == expected[:1]
    target.drain()
    assert target.ids(asked.request_id) == expected


def test_an_export_that_raises_fails_alone(stepped):
    class Broken(Carrier):
        def layer(self, layer: int, first_token: int, kv: np.ndarray) -> None:
            raise OSError("the peer is gone")

    engine, broken, beside = stepped(), Broken(), request(prompt(20), 4)
    engine.engine.prefill(Submission(request=request(prompt(30), 4)), 0, broken)
    engine.generate(beside)
    assert broken.failure is not None
    assert broken.failure[1]
    assert "the peer is gone" in broken.failure[0]
    assert len(engine.ids(beside.request_id)) == 4
    assert engine.engine.load().kv_blocks_used == 0


def test_an_unknown_request_fails_its_export(stepped):
    engine, carrier = stepped(), Carrier()
    engine.engine.export_running("nobody", 0, carrier)
    engine.drain()
    assert carrier.failure == ("request nobody attempt 0 is not here", True)


def test_kv_that_does_not_fit_is_refused(stepped):
    engine = stepped()
    asked = request(prompt(20), 4)
    place = engine.engine.reserve(Submission(request=asked))
    good = np.zeros((2, 20, 2, 16), dtype=np.float32)
    for layer, first, kv in [(2, 0, good), (0, 0, good[:, :, :1]), (0, 0, good.astype(np.float64)), (0, 10, good), (0, -1, good)]:
        with pytest.raises(ProtocolMismatch):
            place.write(layer, first, kv)
    place.write(0, 0, good)
    with pytest.raises(ProtocolMismatch, match="token 0 in layer 1 never came"):
        place.commit(RequestState(request=asked, generated=(EOS,)), 0)
    place.abort()
    place.abort()
    with pytest.raises(Unreachable):
        place.write(0, 0, good)
    assert engine.engine.load().kv_blocks_used == 0


def test_what_others_left_in_a_reserved_block_changes_nothing(stepped):
    asked, beside = request(prompt(39), 20), request(prompt(75, seed=1), 20)
    source, target, carrier = stepped(), stepped(kv_blocks=16), Carrier()
    source.engine.prefill(Submission(request=asked), 0, carrier)
    source.drain()
    for layer in target.engine._kv.layers:
        layer[:-1] = np.nan
    hand_over(carrier, target, Submission(request=asked))
    target.submit(beside)
    target.drain()
    assert [target.ids(asked.request_id), target.ids(beside.request_id)] == stepped().generate(asked, beside)


def test_no_room_to_reserve_is_no_error(stepped):
    engine = stepped(kv_blocks=4, max_running=2)
    place = engine.engine.reserve(Submission(request=request(prompt(40), 4)))
    assert engine.engine.reserve(Submission(request=request(prompt(40, seed=1), 4))) is None
    place.abort()
    assert engine.engine.reserve(Submission(request=request(prompt(40, seed=1), 4))) is not None
