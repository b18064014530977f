"""A checkpoint that cannot be served is refused with the file or the feature at fault."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
    T5Config,
)

from cluster.errors import InvalidConfig, InvalidModel
from workers.engines.torch_engine.engine import TorchEngine
from workers.engines.torch_engine.loading import load

SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

UNSUPPORTED = {
    "sliding_window 64": MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=64),
    "sliding_attention": Qwen3Config(
        **SMALL, num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "gemma2": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16),
    "mamba": MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2),
    "encoder-decoder": T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2),
    "bert": BertConfig(**SMALL),
}


def opened(path, **options):
    return load(str(path), **{"block_tokens": 16, "dtype": "float32", "device": torch.device("cpu"), **options})


@pytest.fixture
def copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "copy")


@pytest.mark.parametrize("feature", UNSUPPORTED)
def test_what_is_not_full_attention_is_refused_by_name(feature, copy):
    UNSUPPORTED[feature].save_pretrained(copy)
    with pytest.raises(InvalidModel, match=feature):
        opened(copy)


def test_the_layout_is_what_the_model_computes(model_paths):
    layout = opened(model_paths["qwen3"]).layout
    assert (layout.layers, layout.kv_heads, layout.head_dim) == (3, 2, 32)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(name, copy):
    (copy / name).unlink()
    with pytest.raises(InvalidModel, match=rf"{name} is missing"):
        opened(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_truncated_file_is_named(name, copy):
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InvalidModel, match=name):
        opened(copy)


def test_a_missing_shard_is_named(copy):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00002.safetensors"}}))
    with pytest.raises(InvalidModel, match=r"model-00002.safetensors is missing"):
        opened(copy)


def test_a_missing_weight_is_named(copy):
    config = AutoModelForCausalLM.from_pretrained(copy).config
    config.num_hidden_layers = 3
    config.save_pretrained(copy)
    with pytest.raises(InvalidModel, match=r"lacks 9 weights, model\.layers\.2"):
        opened(copy)


def test_half_precision_on_cpu_is_refused(llama):
    with pytest.raises(InvalidConfig, match="'bfloat16' on cpu"):
        opened(llama, dtype="bfloat16")
    with pytest.raises(InvalidConfig, match="'int4' is none of"):
        opened(llama, dtype="int4")


def test_a_pool_larger_than_memory_is_refused(llama):
    with pytest.raises(InvalidConfig, match=r"kv_blocks 1000000000 take .* GiB"):
        TorchEngine(path=str(llama), model="tiny", kv_blocks=10**9).start(lambda _: None)
