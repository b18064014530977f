from __future__ import annotations

import pytest

from cluster.errors import InvalidConfig
from cluster.models import model_shape

# Parameter counts of the safetensors index on each model's page; the OPT ones are those of the paper (arXiv:2205.01068),
# and BLOOM's of its model card.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "bloom-176b": 176_247_271_424,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones_to_the_last(name: str) -> None:
    assert model_shape(name).parameters() == PUBLISHED[name]


@pytest.mark.parametrize(("name", "billions"), [("opt-13b", 13.0), ("opt-66b", 66.0)])
def test_opt_parameters_are_near_the_name(name: str, billions: float) -> None:
    assert model_shape(name).parameters() / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize(("name", "billions"), [("qwen3-30b-a3b", 3.3), ("qwen3-235b-a22b", 22.0), ("mixtral-8x7b", 12.9)])
def test_a_token_meets_the_published_active_parameters(name: str, billions: float) -> None:
    shape = model_shape(name)
    looked_up = shape.vocabulary * shape.hidden
    assert (shape.matrix_parameters() + looked_up) / 1e9 == pytest.approx(billions, rel=0.03)


def test_bytes_follow_the_dtype() -> None:
    shape = model_shape("llama-3.1-8b")
    assert shape.weight_bytes() == 2 * shape.parameters()
    assert shape.kv_bytes_per_token() == 128 * 1024
    assert shape.kv_bytes_per_token("float32") == 2 * shape.kv_bytes_per_token()


def test_an_unknown_shape_names_those_near_it() -> None:
    with pytest.raises(InvalidConfig, match=r"'llama-3-8b' is not known; near: .*llama-3\.1-8b"):
        model_shape("llama-3-8b")
