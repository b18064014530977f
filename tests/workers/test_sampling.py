import math
from collections import Counter
from itertools import pairwise

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.request import SamplingParams
from workers.engines.torch_engine.sampling import SamplerState, _keep_top_p, draw, uniform

VOCABULARY = 12
EOS = frozenset({0})
LOGITS = torch.tensor([1.5, -0.3, 0.9, 2.2, -1.1, 0.0, 3.0, 0.4, -2.0, 1.1, 0.7, -0.6])

params = st.builds(
    SamplingParams,
    max_tokens=st.just(64),
    min_tokens=st.integers(0, 4),
    temperature=st.sampled_from([0.0, 1e-300, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([None, 1, 3, 1000]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(-(2**63) + 1, 2**63 - 1),
    stop_token_ids=st.sampled_from([(), (3,), (3, 9999)]),
    logprobs=st.sampled_from([None, 0, 2, 20]),
)
tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=6)


def state(params: SamplingParams, prompt=(), generated=()) -> SamplerState:
    return SamplerState(params, prompt, generated, VOCABULARY, EOS)


def sampled(**fields) -> SamplingParams:
    return SamplingParams(max_tokens=64, **fields)


def draw_one(params: SamplingParams, prompt=(), generated=(), logits: torch.Tensor = LOGITS):
    return draw(logits.unsqueeze(0), [state(params, prompt, generated)])[0]


def support(params: SamplingParams, draws: int = 400) -> set[int]:
    states = [state(msgspec.structs.replace(params, seed=seed)) for seed in range(draws)]
    return {drawn.token_id for drawn in draw(LOGITS.expand(draws, -1), states)}


def test_plain_greedy_is_the_argmax_of_each_row():
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(1))
    drawn = draw(logits, [state(sampled(temperature=0.0))] * 5)
    assert [each.token_id for each in drawn] == logits.argmax(-1).tolist()
    assert all(each.logprob is None and each.top == () for each in drawn)


@given(st.lists(st.tuples(params, tokens, tokens), min_size=1, max_size=5), st.integers(0, 2**31))
def test_a_row_does_not_depend_on_its_batch_and_logits_are_left_alone(rows, seed):
    logits = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    before = logits.clone()
    together = draw(logits, [state(*row) for row in rows])
    alone = [draw_one(*row, logits=logits[index]) for index, row in enumerate(rows)]
    assert [each.token_id for each in together] == [each.token_id for each in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
    assert torch.equal(logits, before)


@given(params, tokens, st.lists(st.integers(0, VOCABULARY - 1), max_size=8), st.data())
def test_a_state_rebuilt_from_its_tokens_draws_what_the_original_draws(params, prompt, generated, data):
    kept = data.draw(st.integers(0, len(generated)))
    moved = state(params, prompt, generated[:kept])
    for token_id in generated[kept:]:
        moved.append(token_id)
    assert draw(LOGITS.unsqueeze(0), [moved])[0] == draw_one(params, prompt, generated)


@pytest.mark.parametrize("top_k", [1, 2, 5, VOCABULARY, 1000])
def test_top_k_draws_from_the_k_most_probable(top_k):
    best = set(LOGITS.argsort(descending=True)[:top_k].tolist())
    drawn = support(sampled(top_k=top_k, temperature=2.0), draws=3000)
    assert drawn == best


@pytest.mark.parametrize("top_p", [0.001, 0.3, 0.5, 0.8, 0.95])
def test_top_p_draws_from_the_smallest_set_that_reaches_p(top_p):
    probabilities = sorted(enumerate(LOGITS.double().softmax(-1).tolist()), key=lambda each: -each[1])
    nucleus, total = set(), 0.0
    for token, probability in probabilities:
        nucleus.add(token)
        total += probability
        if total >= top_p:
            break
    assert support(sampled(top_p=top_p), draws=3000) == nucleus


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-9, 0.01, 0.3, 0.3, 1.0, 5.0]), min_size=1, max_size=40).filter(any),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 2**-53]),
)
def test_top_p_keeps_what_sorting_all_would_keep(weights, top_p):
    ordered, before, total = sorted(weights, reverse=True), 0.0, sum(weights)
    for smallest in ordered:
        before += smallest
        if before >= top_p * total:
            break
    row = torch.tensor(weights, dtype=torch.float64)
    _keep_top_p(row, top_p)
    assert row.tolist() == pytest.approx([weight if weight >= smallest else 0.0 for weight in weights])


def test_rows_with_and_without_top_p_and_top_k_share_a_batch():
    states = [
        state(sampled(seed=seed, temperature=2.0, **limit)) for seed in range(1500) for limit in ({"top_k": 2}, {"top_p": 0.1}, {})
    ]
    drawn = [each.token_id for each in draw(LOGITS.expand(len(states), -1), states)]
    assert set(drawn[0::3]) == {3, 6}
    assert set(drawn[1::3]) == {6}
    assert set(drawn[2::3]) == set(range(VOCABULARY))


def test_draws_follow_the_distribution():
    draws = 20_000
    states = [state(sampled(seed=seed, temperature=0.8)) for seed in range(draws)]
    counts = Counter(drawn.token_id for drawn in draw(LOGITS.expand(draws, -1), states))
    expected = (LOGITS.double() / 0.8).softmax(-1) * draws
    chi_square = sum((counts[token] - mean) ** 2 / mean for token, mean in enumerate(expected.tolist()))
    assert chi_square < 31.3  # The 99.9 % quantile at 11 degrees of freedom.


def test_uniform_numbers_fill_the_unit_interval_along_seeds_and_along_positions():
    for numbers in ([uniform(seed, 7) for seed in range(10_000)], [uniform(-3, position) for position in range(10_000)]):
        assert all(0.0 <= number < 1.0 for number in numbers)
        bins = Counter(int(number * 20) for number in numbers)
        assert sum((bins[index] - 500) ** 2 / 500 for index in range(20)) < 43.8  # 99.9 %, 19 degrees of freedom.
        lagged = sum((a - 0.5) * (b - 0.5) for a, b in pairwise(numbers)) / len(numbers) * 12
        assert abs(lagged) < 0.04


def test_positions_of_one_seed_differ():
    assert len({uniform(11, position) for position in range(1000)}) == 1000


def test_repetition_penalty_covers_prompt_and_output():
    logits = torch.tensor([0.0, -1.0, 2.0, -1.1])
    penalised = SamplerState(sampled(temperature=0.0, repetition_penalty=4.0), (2,), (1,), 4, EOS)
    row = logits.clone()
    penalised.adjust(row)
    assert row.tolist() == pytest.approx([0.0, -4.0, 0.5, -1.1])


def test_presence_and_frequency_penalties_cover_the_output_only():
    penalised = SamplerState(sampled(presence_penalty=0.5, frequency_penalty=0.25), (0, 0), (1, 2, 2), 4, EOS)
    row = torch.zeros(4)
    penalised.adjust(row)
    assert row.tolist() == [0.0, -0.75, -1.0, 0.0]


def test_min_tokens_keeps_the_end_away_until_reached():
    logits = torch.tensor([9.0, 1.0, 8.0, 0.0])
    masked = SamplerState(sampled(temperature=0.0, min_tokens=2, stop_token_ids=(2, 77)), (), (), 4, EOS)
    drawn = []
    for _ in range(3):
        drawn.append(draw(logits.unsqueeze(0), [masked])[0].token_id)
        masked.append(drawn[-1])
    assert drawn == [1, 1, 0]


def test_logprobs_are_the_models_own_whatever_the_sampling():
    drawn = draw_one(sampled(temperature=0.2, presence_penalty=2.0, top_k=1, logprobs=3), generated=(6, 6))
    own = LOGITS.log_softmax(-1)
    assert drawn.logprob == pytest.approx(own[drawn.token_id].item())
    assert [token for token, _ in drawn.top] == [6, 3, 0]
    assert [value for _, value in drawn.top] == pytest.approx(own[[6, 3, 0]].tolist())


def test_logprobs_zero_gives_the_chosen_tokens_alone():
    drawn = draw_one(sampled(temperature=0.0, logprobs=0))
    assert math.exp(drawn.logprob) == pytest.approx(LOGITS.softmax(-1)[6].item())
    assert drawn.top == ()
