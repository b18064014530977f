import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.errors import InvalidConfig
from cluster.models import model_shape
from workers.engines.torch_engine import tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOBULA_CACHE", str(tmp_path / "cache"))


def weights(directory) -> bytes:
    return (directory / "model.safetensors").read_bytes()


@pytest.mark.parametrize("preset", tiny_model.PRESETS)
def test_a_checkpoint_loads_and_stays_finite_over_its_context(preset):
    directory = tiny_model.ensure(preset, steps=1)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.float32
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        model.generation_config.bos_token_id,
        model.generation_config.eos_token_id,
    )
    ids = torch.tensor([tokenizer("The Queen of Hearts " * 2000)["input_ids"][: tiny_model.CONTEXT_TOKENS]])
    with torch.inference_mode():
        assert model(ids, use_cache=False, logits_to_keep=64).logits.isfinite().all()


@pytest.mark.parametrize("preset", tiny_model.PRESETS)
def test_the_catalogue_has_the_shape_that_is_trained(preset):
    config = tiny_model.PRESETS[preset]()
    assert AutoModelForCausalLM.from_config(config).num_parameters() == model_shape(preset).parameters()


def test_the_tokenizer_gives_any_text_back_and_knows_a_chat():
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.ensure("tiny-dense", steps=1))
    text = "Off with her head!  東京 🌊\n\n\tcafé"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|begin|>Who are you?\n\n"


def test_one_recipe_gives_one_model(tmp_path, monkeypatch):
    first = tiny_model.ensure("tiny-dense", steps=2)
    monkeypatch.setenv("MOBULA_CACHE", str(tmp_path / "other"))
    torch.manual_seed(5)
    again = tiny_model.ensure("tiny-dense", steps=2)
    assert first != again
    assert weights(first) == weights(again)


def test_a_trained_model_is_found_again_and_another_recipe_is_another_model():
    steps = []
    first = tiny_model.ensure("tiny-dense", steps=2, progress=lambda *step: steps.append(step[:2]))
    assert steps == [(1, 2), (2, 2)]
    assert tiny_model.ensure("tiny-dense", steps=2, progress=lambda *step: steps.append(step[:2])) == first
    assert len(steps) == 2
    assert tiny_model.ensure("tiny-dense", steps=1) != first


def test_training_that_is_cut_off_leaves_nothing(tmp_path):
    def cut(done: int, total: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_model.init("tiny-dense", tmp_path / "model", steps=2, progress=cut)
    assert not (tmp_path / "model").exists()
    assert [path.suffix for path in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def test_init_replaces_a_model_of_its_own_and_keeps_an_equal_one(tmp_path):
    model = tmp_path / "model"
    tiny_model.init("tiny-dense", model, steps=1)
    (model / "note").write_text("kept by an equal recipe")
    tiny_model.init("tiny-dense", model, steps=1)
    assert (model / "note").exists()
    tiny_model.init("tiny-dense", model, steps=2)
    assert not (model / "note").exists()
    assert json.loads((model / tiny_model.MARKER).read_text())["steps"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "model"]


def test_a_cache_that_is_no_directory_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOBULA_CACHE", str(tmp_path / "file"))
    with pytest.raises(InvalidConfig, match=r"model cache .*file"):
        tiny_model.ensure("tiny-dense", steps=1)
