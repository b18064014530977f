"""The engine's tokens are the model's own, however the work is cut into steps."""

from __future__ import annotations

import queue

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.errors import InvalidRequest, Overloaded, Unreachable
from cluster.kv import KvRemoved, KvStored
from tests.workers.torch_engine.tiny import prompt, request
from workers.engines.engine import Submission
from workers.engines.torch_engine import engine as engine_module
from workers.engines.torch_engine.engine import TorchEngine


def reference(path, prompt_ids: list[int], max_tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor([prompt_ids])
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return output[0, len(prompt_ids) :].tolist()


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
def test_greedy_tokens_are_those_of_transformers(name, model_paths, stepped):
    engine = stepped(model_paths[name])
    assert engine.generate(request(prompt(37), 24)) == [reference(model_paths[name], prompt(37), 24)]


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
def test_a_prompt_in_chunks_gives_the_tokens_of_a_prompt_in_one(name, model_paths, stepped):
    whole = stepped(model_paths[name]).generate(request(prompt(101), 12))
    assert stepped(model_paths[name], step_budget_tokens=7).generate(request(prompt(101), 12)) == whole


def test_ragged_requests_together_give_the_tokens_of_each_alone(stepped):
    requests = [request(prompt(length, seed=length), 10) for length in (1, 5, 16, 17, 64, 300, 700)]
    alone = [stepped().generate(each)[0] for each in requests]
    together = stepped(step_budget_tokens=90)
    assert together.generate(*requests) == alone
    assert together.engine.load().steps < sum(10 + len(each.prompt) // 90 + 1 for each in requests)


def test_seeded_sampling_does_not_depend_on_the_batch(stepped):
    sampled = request(prompt(20), 16, temperature=1.0, top_p=0.9, seed=5, presence_penalty=0.5, logprobs=2)
    alone = stepped().generate(sampled)[0]
    company = [request(prompt(30, seed=i), 16, temperature=1.5, seed=i) for i in range(5)]
    assert stepped(step_budget_tokens=64).generate(*company, sampled)[-1] == alone


def test_preempted_requests_give_the_same_tokens(stepped):
    requests = [request(prompt(30, seed=i), 40, temperature=1.0, seed=i) for i in range(4)]
    roomy = stepped().generate(*requests)
    tight = stepped(kv_blocks=12)
    assert tight.generate(*requests) == roomy
    assert tight.engine.load().preemptions > 0
    assert tight.engine.load().kv_blocks_used == 0


def test_the_newest_of_the_lowest_priority_is_preempted(stepped):
    engine = stepped(kv_blocks=6)
    urgent = request(prompt(30, seed=1), 40, priority=1)
    old, new = request(prompt(15, seed=2), 40), request(prompt(15, seed=3), 40)
    engine.submit(old, new, urgent)
    engine.drain()
    finished = [token.request_id for token in engine.tokens if token.finish]
    assert finished == [urgent.request_id, old.request_id, new.request_id]


def test_each_index_comes_once_and_carries_times_first(stepped):
    engine = stepped(kv_blocks=12)
    requests = [request(prompt(30, seed=i), 40) for i in range(4)]
    engine.submit(*requests)
    engine.drain()
    for each in requests:
        tokens = engine.of(each.request_id)
        assert [token.index for token in tokens] == list(range(40))
        assert [token.finish for token in tokens] == [None] * 39 + ["length"]
        assert [token.times is not None for token in tokens] == [True] + [False] * 39


def test_a_resumed_request_goes_on_where_the_tokens_shown_ended(stepped):
    whole = request(prompt(40), 20, temperature=1.0, seed=9, frequency_penalty=0.3)
    tokens = stepped().generate(whole)[0]
    resumed = stepped()
    resumed.engine.submit(Submission(request=whole, attempt=1, generated=tuple(tokens[:7])))
    resumed.drain()
    assert resumed.ids(whole.request_id) == tokens[7:]
    assert [token.index for token in resumed.tokens] == list(range(7, 20))


def test_a_prefix_is_computed_once_and_its_last_token_always(stepped):
    engine = stepped()
    first = engine.generate(request(prompt(64), 4))
    computed = engine.engine.load().prompt_tokens
    again = request(prompt(64), 4)
    assert engine.generate(again) == first
    assert engine.of(again.request_id)[0].cached_tokens == 48
    assert engine.engine.load().prompt_tokens == computed + 16


def test_requests_that_come_together_share_the_prefix_being_computed(stepped):
    engine = stepped()
    shared = prompt(64)
    requests = [request(shared + prompt(5, seed=i), 4) for i in range(1, 5)]
    together = engine.generate(*requests)
    assert engine.engine.load().cached_tokens == 3 * 64
    assert together == [stepped().generate(each)[0] for each in requests]


def test_tenants_with_unlike_salts_share_nothing(stepped):
    engine = stepped()
    engine.generate(request(prompt(64), 4))
    engine.generate(msgspec.structs.replace(request(prompt(64), 4), salt="other"))
    assert engine.engine.load().cached_tokens == 0


def test_block_events_add_up_to_what_is_cached(stepped):
    engine = stepped(kv_blocks=12)
    engine.generate(*(request(prompt(50, seed=i), 20) for i in range(8)))
    held: set[int] = set()
    for output in engine.outputs:
        for event in output.kv_events:
            match event:
                case KvStored(hashes=hashes, tokens=tokens):
                    assert len(tokens) == 16 * len(hashes)
                    held |= set(hashes)
                case KvRemoved(hashes=hashes):
                    held -= set(hashes)
    assert held == {event.hashes[0] for event in engine.engine.cached_blocks()[1:]}


def test_abort_frees_the_blocks_and_says_so_once(stepped):
    engine = stepped(step_budget_tokens=32)
    running, waiting = request(prompt(20), 50), request(prompt(400, seed=1), 50)
    engine.submit(running, waiting)
    for _ in range(4):
        engine.engine.step()
    engine.engine.abort(running.request_id)
    engine.engine.abort(waiting.request_id, 0)
    engine.engine.abort("nobody")
    engine.drain()
    assert [token.finish for token in engine.tokens if token.finish] == ["abort", "abort"]
    assert engine.engine.load().kv_blocks_used == 0


def test_what_can_never_fit_is_refused_at_once(stepped):
    engine = stepped(kv_blocks=8)
    with pytest.raises(InvalidRequest, match="take 9 blocks, above the pool's 8"):
        engine.submit(request(prompt(100), 30))
    with pytest.raises(InvalidRequest, match="plus max_tokens 4000 above 4096"):
        engine.submit(request(prompt(100), 4000))
    with pytest.raises(InvalidRequest, match="token id 300 outside"):
        engine.submit(request([300], 1))
    with pytest.raises(InvalidRequest, match="empty prompt"):
        engine.submit(request([], 1))


def test_a_full_queue_refuses(stepped, monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_WAITING", 2)
    engine = stepped()
    engine.submit(request([1]), request([1]))
    with pytest.raises(Overloaded, match="2 requests wait"):
        engine.submit(request([1]))


def test_a_step_that_raises_fails_its_requests_and_the_engine_goes_on(stepped, monkeypatch):
    engine = stepped()
    broken = request(prompt(20), 4)
    engine.submit(broken)
    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "draw", lambda *_: 1 / 0)
        engine.engine.step()
    [token] = engine.tokens
    assert (token.finish, token.retry) == ("error", True)
    assert "division by zero" in token.error
    after = request(prompt(20), 4)
    assert engine.generate(after) == stepped().generate(after)
    assert engine.engine.load().kv_blocks_used == 0


def test_a_request_that_breaks_a_step_breaks_no_neighbour(stepped, monkeypatch):
    engine, poison = stepped(), 293
    logits = engine.engine._logits

    def breaking(ids, *rest):
        if poison in ids:
            raise MemoryError("too much")
        return logits(ids, *rest)

    monkeypatch.setattr(engine.engine, "_logits", breaking)
    decoding, beside, broken = request(prompt(20), 12), request(prompt(30, seed=1), 12), request([1, poison, 2], 12)
    engine.submit(decoding)
    engine.engine.step()
    engine.submit(broken, beside)
    engine.drain()
    [token] = engine.of(broken.request_id)
    assert (token.finish, token.retry) == ("error", True)
    assert "too much" in token.error
    assert [engine.ids(decoding.request_id), engine.ids(beside.request_id)] == stepped().generate(decoding, beside)
    assert engine.engine.load().kv_blocks_used == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_end_their_own_request(temperature, stepped, monkeypatch):
    engine = stepped()
    broken, beside = request(prompt(20), 8, temperature=temperature), request(prompt(30), 8)
    logits = engine.engine._logits

    def poisoned(ids, *rest):
        computed = logits(ids, *rest)
        computed[0] = torch.nan
        return computed

    engine.submit(broken)
    with monkeypatch.context() as patch:
        patch.setattr(engine.engine, "_logits", poisoned)
        engine.submit(beside)
        engine.engine.step()
    engine.drain()
    [token] = engine.of(broken.request_id)
    assert (token.finish, token.retry) == ("error", False)
    assert "no finite logits for token 0" in token.error
    assert [engine.ids(beside.request_id)] == stepped().generate(beside)
    assert engine.engine.load().kv_blocks_used == 0


@pytest.mark.parametrize("left", [torch.nan, torch.inf])
def test_what_others_left_in_a_block_changes_nothing(left, stepped):
    requests = [request(prompt(length, seed=length), 40) for length in (7, 20, 37)]
    engine = stepped(kv_blocks=24)
    for layer in engine.engine._kv.layers:
        layer[:-1] = left
    assert engine.generate(*requests) == stepped().generate(*requests)


def test_an_engine_whose_books_break_ends_and_says_so(llama):
    heard: queue.Queue = queue.Queue()
    engine = TorchEngine(path=str(llama), model="tiny", kv_blocks=16)
    engine.start(heard.put)
    assert engine.alive
    engine._scheduler.plan = lambda *_: 1 / 0
    engine.submit(Submission(request=request(prompt(20), 4)))
    [token] = heard.get(timeout=30).tokens
    assert (token.finish, token.error, token.retry) == ("error", "the engine stopped", True)
    assert not engine.alive
    with pytest.raises(Unreachable):
        engine.submit(Submission(request=request(prompt(20), 4)))


def test_warming_measures_a_performance_with_no_negative_part(stepped):
    engine = stepped()
    engine.engine.warm()
    found = engine.engine.performance
    assert found.step_s > 0
    assert min(found.prefill_token_s, found.prefill_pair_s, found.sequence_s, found.kv_token_s) >= 0
    assert engine.engine.load().kv_blocks_used == 0


def test_a_long_prompt_stalls_no_stream_that_shares_a_full_pool(stepped, monkeypatch):
    """16 ragged streams share 75 % of their prefix, in a pool with room for shared and unique blocks only."""
    budget, block, outputs = 128, 16, 40
    shared = prompt(192)
    streams = [request(shared + prompt(64 - i, seed=i + 1), outputs) for i in range(16)]
    late = request(prompt(2048, seed=99), 8)
    unique = sum(-(-(len(each.prompt) + outputs - 1) // block) - len(shared) // block for each in streams)
    late_blocks = -(-(2048 + 8 - 1) // block)
    engine = stepped(kv_blocks=len(shared) // block + unique + late_blocks, step_budget_tokens=budget)

    forwards: list[int] = []
    logits = engine.engine._logits

    def counted(ids, *rest):
        forwards.append(len(ids))
        return logits(ids, *rest)

    monkeypatch.setattr(engine.engine, "_logits", counted)
    engine.submit(*streams)
    while engine.engine.load().running < 16:
        engine.engine.step()
    before = len(engine.outputs)
    engine.submit(late)
    engine.drain()

    load = engine.engine.load()
    assert load.preemptions == 0
    assert len(forwards) == load.steps
    assert max(forwards) <= budget
    # No gap: each stream shows a token in every output from the long prompt's arrival to its own end.
    for stream in streams:
        at = [i for i, output in enumerate(engine.outputs) if any(t.request_id == stream.request_id for t in output.tokens)]
        late_part = [i for i in at if i >= before]
        assert late_part == list(range(before, at[-1] + 1))
    assert [engine.ids(each.request_id) for each in streams[:2]] == [stepped().generate(each)[0] for each in streams[:2]]
    assert len(engine.ids(late.request_id)) == 8
