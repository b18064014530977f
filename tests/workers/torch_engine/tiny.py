"""Tiny random models of the shapes the engine serves, engines that the test steps itself, and requests for them."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from cluster.handoff import Token
from cluster.request import Request, SamplingParams
from workers.engines.engine import StepOutput, Submission
from workers.engines.torch_engine.engine import TorchEngine

VOCABULARY = 300
EOS = 299

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "initializer_range": 0.3,  # Wide, so that the best two logits are far apart.
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_COMMON, num_hidden_layers=2),
    "qwen3": Qwen3Config(**_COMMON, num_hidden_layers=3, head_dim=32),
    "qwen3_moe": Qwen3MoeConfig(
        **_COMMON, num_hidden_layers=2, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}


def save_model(config: PretrainedConfig, path: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


class Stepped:
    """An engine without a thread, and what it said."""

    def __init__(self, path: Path, **options: object) -> None:
        self.outputs: list[StepOutput] = []
        self.engine = TorchEngine(path=str(path), model="tiny", **{"kv_blocks": 256, **options})
        self.engine.open(self.outputs.append)

    @property
    def tokens(self) -> list[Token]:
        return [token for output in self.outputs for token in output.tokens]

    def of(self, request_id: str) -> list[Token]:
        return [token for token in self.tokens if token.request_id == request_id]

    def ids(self, request_id: str) -> list[int]:
        return [token.token_id for token in self.of(request_id) if token.token_id is not None]

    def submit(self, *requests: Request) -> None:
        for request in requests:
            self.engine.submit(Submission(request=request))

    def drain(self, steps: int = 2000) -> None:
        """Step until there is nothing to do."""
        for _ in range(steps):
            if not self.engine.step():
                return
        raise AssertionError(f"still busy after {steps} steps")

    def generate(self, *requests: Request) -> list[list[int]]:
        self.submit(*requests)
        self.drain()
        return [self.ids(request.request_id) for request in requests]


_names = (f"r{i}" for i in itertools.count())


def request(
    prompt: list[int], max_tokens: int = 8, *, request_id: str | None = None, priority: int = 0, **sampling: object
) -> Request:
    """Greedy and blind to the end of text, unless told otherwise."""
    options = {"temperature": 0.0, "ignore_eos": True, **sampling}
    return Request(
        request_id=request_id or next(_names),
        model="tiny",
        prompt=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, **options),
        priority=priority,
    )


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()
