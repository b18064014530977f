"""The engine's tokens are the model's own, however the work is cut into steps."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.workers.torch_engine.tiny import prompt, request


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
