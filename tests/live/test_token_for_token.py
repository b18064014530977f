"""The promise that a client cannot tell where, or on how many replicas, its tokens were computed.

Whole answers are compared token by token and as text, streams as text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from tests.live.conftest import APART, LiveFleet, eventually, freeze, kill, torch_group

pytestmark = pytest.mark.timeout(400)  # Fleets start inside fixtures.

PROMPTS = tuple(
    text * 6
    for text in (
        "In the beginning there was a great silence over the waters, and ",
        "The king said unto his servants: go forth into the land and ",
        "And it came to pass in those days that the people ",
    )
)
TOKENS = 48
SAMPLED = {"temperature": 0.9, "seed": 7, "top_p": 0.95}
GREEDY: dict[str, Any] = {"temperature": 0}
LONG = 400
"""Output tokens of a stream that is to be cut: long enough to be still running when its worker dies."""


@pytest.fixture(scope="module")
def over_grpc(start_fleet: Callable[..., LiveFleet], model_dir: object) -> LiveFleet:
    """Two prefill and four decode replicas, since the tests kill some; every prompt is prefilled apart."""
    config = {
        "models": [{"name": "tiny", "path": str(model_dir)}],
        "replicas": [torch_group("prefill", 2), torch_group("decode", 4)],
        "transport": {"kv": "grpc"},
        "routing": APART,
    }
    return start_fleet("over-grpc", config)


@pytest.fixture(scope="module")
def one_host(start_fleet: Callable[..., LiveFleet], model_dir: object) -> LiveFleet:
    """The same checkpoint twice: apart over shared memory, and together in one mixed replica."""
    config = {
        "models": [{"name": "apart", "path": str(model_dir)}, {"name": "together", "path": str(model_dir)}],
        "replicas": [torch_group("prefill", 1, "apart"), torch_group("decode", 1, "apart"), torch_group("mixed", 1, "together")],
        "transport": {"kv": "shared_memory"},
        "routing": APART,
    }
    return start_fleet("one-host", config)


class Answer(NamedTuple):
    """A whole completion."""

    text: str
    tokens: list[str]


def generate_alone(model_dir: object, prompt: str) -> Answer:
    """`transformers.generate`, greedy, alone in this process."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_dir))
    model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode(prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS)
    generated = out[0, ids.shape[1] :]
    tokens = [tokenizer.decode(token) for token in generated]
    return Answer(tokenizer.decode(generated, skip_special_tokens=True), tokens)


def complete(fleet: LiveFleet, model: str, prompt: str, sampling: dict[str, Any], tokens: int = TOKENS) -> Answer:
    done = fleet.client().completions.create(model=model, prompt=prompt, max_tokens=tokens, logprobs=0, **sampling)
    choice = done.choices[0]
    return Answer(choice.text, choice.logprobs.tokens)


def transfers(fleet: LiveFleet, replicas: list[dict]) -> float:
    return sum(fleet.metric(replica, "mobula_replica_transfers_total") for replica in replicas)


def test_greedy_equals_transformers_wherever_it_is_computed(over_grpc: LiveFleet, one_host: LiveFleet, model_dir: object) -> None:
    for prompt in PROMPTS:
        alone = generate_alone(model_dir, prompt)
        assert complete(one_host, "together", prompt, GREEDY) == alone
        assert complete(one_host, "apart", prompt, GREEDY) == alone
        assert complete(over_grpc, "tiny", prompt, GREEDY) == alone


def test_seeded_is_equal_together_apart_over_grpc_and_apart_over_shared_memory(over_grpc: LiveFleet, one_host: LiveFleet) -> None:
    for prompt in PROMPTS:
        together = complete(one_host, "together", prompt, SAMPLED)
        assert complete(one_host, "apart", prompt, SAMPLED) == together
        assert complete(over_grpc, "tiny", prompt, SAMPLED) == together


def test_apart_means_that_kv_was_transferred(over_grpc: LiveFleet, one_host: LiveFleet) -> None:
    for fleet, model in ((over_grpc, "tiny"), (one_host, "apart")):
        decoders = fleet.replicas("decode")
        before = transfers(fleet, decoders)
        complete(fleet, model, f"{fleet.name}: a prompt nobody has sent before, " * 8, GREEDY, tokens=4)
        eventually(lambda: transfers(fleet, decoders) > before, "a KV transfer is counted")  # noqa: B023


def serving(fleet: LiveFleet, role: str) -> dict:
    """The replica of a role that runs the only stream there is."""
    found: list[dict] = []

    def look() -> bool:
        found[:] = [row for row in fleet.replicas(role) if row["running"] > 0]
        return bool(found)

    eventually(look, f"one {role} replica runs the stream")
    return found[0]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("end", [kill, freeze], ids=["kill -9", "SIGSTOP"])
def test_stream_outlives_its_decode_worker(over_grpc: LiveFleet, sampling: dict[str, Any], end: Callable[[dict], None]) -> None:
    if len(over_grpc.replicas("decode")) < 2:
        pytest.fail("no decode replica would be left")
    whole = complete(over_grpc, "tiny", PROMPTS[0], {**sampling, "extra_body": {"ignore_eos": True}}, LONG)
    stream = over_grpc.client().completions.create(
        model="tiny", prompt=PROMPTS[0], max_tokens=LONG, stream=True, extra_body={"ignore_eos": True}, **sampling
    )
    pieces = [next(stream).choices[0].text for _ in range(3)]
    end(serving(over_grpc, "decode"))
    pieces += [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole.text
