"""A checkpoint that cannot be served is refused with the file or the feature at fault."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
    StableLmConfig,
    T5Config,
)

from cluster.errors import InvalidConfig, InvalidModel
from tests.workers.torch_engine.test_torch_engine import reference
from tests.workers.torch_engine.tiny import prompt, request, save_model
from workers.engines.torch_engine import attention
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
    "bloom": BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=2),
    "longrope": LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
            "factor": 2.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
        },
    ),
    "quantised .gptq.": LlamaConfig(**SMALL, quantization_config={"quant_method": "gptq", "bits": 4}),
}
OUR_ATTENTION_DOES_NOT_FIT = {
    "unlike shapes": DeepseekV3Config(
        **SMALL,
        num_key_value_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=2,
    ),
    "does not take paged attention": StableLmConfig(**SMALL, num_key_value_heads=2),
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


@pytest.mark.parametrize("feature", OUR_ATTENTION_DOES_NOT_FIT)
def test_what_does_not_attend_as_we_do_is_refused_by_name(feature, tmp_path):
    with pytest.raises(InvalidModel, match=feature):
        opened(save_model(OUR_ATTENTION_DOES_NOT_FIT[feature], tmp_path))


def test_a_model_whose_logits_paging_would_change_is_refused(llama, monkeypatch):
    plain = attention.StepAttention.attend
    monkeypatch.setattr(attention.StepAttention, "attend", lambda *given: 0.5 * plain(*given))
    with pytest.raises(InvalidModel, match=r"paged, its logits differ by \d+% of the largest"):
        opened(llama)


def test_a_decoder_whose_body_is_not_called_model_is_served(tmp_path, stepped):
    config = GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=299, initializer_range=0.3)
    path = save_model(config, tmp_path)
    assert stepped(path).generate(request(prompt(37), 24)) == [reference(path, prompt(37), 24)]


FAULTS = {
    "hidden size .64. is not a multiple": {"num_attention_heads": 5},
    "config.json: integer modulo by zero": {"num_attention_heads": 0},
    "expected int, got str": {"num_attention_heads": "four"},
    "attends in 0 of 0 layers": {"num_hidden_layers": 0},
    "no max_position_embeddings": {"max_position_embeddings": 0},
    r"lm_head.weight has shape \[300, 64\], by config.json \[400, 64\]": {"vocab_size": 400},
    "custom code": {"model_type": "unheard", "auto_map": {"AutoConfig": "x.Y"}},
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_config_at_fault_is_refused_on_one_line(words, copy):
    config = json.loads((copy / "config.json").read_bytes())
    (copy / "config.json").write_text(json.dumps(config | FAULTS[words]))
    with pytest.raises(InvalidModel, match=words) as refused:
        opened(copy)
    assert "\n" not in str(refused.value)


def test_weights_that_are_no_numbers_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidModel, match="not finite"):
        opened(copy)


@pytest.mark.parametrize(("index", "words"), [("[]", "does not parse"), ('{"weight_map": {}}', "names no file")])
def test_a_broken_index_is_refused(index, words, copy):
    (copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InvalidModel, match=f"index.json {words}"):
        opened(copy)


def test_a_tokenizer_that_cannot_be_shown_is_refused_at_once(copy):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(copy / "tokenizer.json"))
    with pytest.raises(InvalidModel, match=r"tokenizer.json: tokenizer decoder none"):
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
