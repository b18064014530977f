from __future__ import annotations

import math

import msgspec
import pytest

from cluster.errors import InvalidRequest
from cluster.request import MAX_SEED, SamplingParams

BOUNDS = [
    ("max_tokens", 1, 2**31 - 1),
    ("temperature", 0.0, 2.0),
    ("top_k", 1, 2**31 - 1),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.01, 10.0),
    ("seed", -MAX_SEED, MAX_SEED),
    ("logprobs", 0, 20),
]
ABOVE = [("top_p", 1.0)]


def _params(**fields: object) -> SamplingParams:
    return msgspec.structs.replace(SamplingParams(max_tokens=16), **fields)


@pytest.mark.parametrize(("field", "low", "high"), BOUNDS)
def test_bounds_are_inside_and_beyond_them_is_not(field: str, low: float, high: float) -> None:
    step = 1 if isinstance(low, int) else 1e-6
    _params(**{field: low}).check()
    _params(**{field: high}).check()
    for value in (low - step, high + step):
        with pytest.raises(InvalidRequest, match=rf"outside \[{low}, {high}\]"):
            _params(**{field: value}).check()


@pytest.mark.parametrize(("field", "high"), ABOVE)
def test_zero_is_not_a_share(field: str, high: float) -> None:
    _params(**{field: high}).check()
    for value in (0.0, high + 1e-6):
        with pytest.raises(InvalidRequest, match=rf"{field} .* outside \(0.0, {high}\]"):
            _params(**{field: value}).check()


@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty", "frequency_penalty", "repetition_penalty"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest):
        _params(**{field: value}).check()


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    _params(min_tokens=16).check()
    with pytest.raises(InvalidRequest, match=r"min_tokens 17 is outside \[0, 16\]"):
        _params(min_tokens=17).check()


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"stop": ("x",) * 17}, "stop"), ({"stop": ("",)}, "stop"), ({"stop": ("x" * 257,)}, "stop"),
     ({"stop_token_ids": (1,) * 65}, "stop_token_ids"), ({"logprobs": 21}, "top_logprobs")],
)  # fmt: skip
def test_the_error_names_the_clients_field(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        _params(**fields).check()
    assert refused.value.param == param


def test_greedy_is_temperature_zero() -> None:
    assert _params(temperature=0.0).greedy
    assert not _params(temperature=0.1).greedy
