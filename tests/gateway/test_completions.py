"""`/v1/completions` as the official client sees it."""

from __future__ import annotations

import asyncio

import openai
import pytest

from tests.gateway.fake_fleet import LETTERS, MODEL, FakeFleet, expected, ids

USAGE = {"include_usage": True}


async def test_a_streamed_completion_has_one_event_a_token_and_usage_at_the_end(serve):
    async with serve(FakeFleet("a")) as served:
        stream = await served.client.completions.create(
            model=MODEL, prompt="hello", max_tokens=12, seed=3, stream=True, stream_options=USAGE
        )
        events = [event async for event in stream]
    *tokens, usage = events
    assert [len(event.choices) for event in tokens] == [1] * 12
    assert "".join(event.choices[0].text for event in tokens) == expected(ids("hello"), 3, 12)
    assert tokens[-1].choices[0].finish_reason == "length"
    assert (usage.choices, usage.usage.prompt_tokens, usage.usage.completion_tokens) == ([], 5, 12)


async def test_a_whole_completion_equals_its_stream(serve):
    async with serve(FakeFleet("a")) as served:
        answer = await served.client.completions.create(model=MODEL, prompt="hello", max_tokens=12, seed=3)
    assert answer.choices[0].text == expected(ids("hello"), 3, 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.object == "text_completion"


async def test_sixteen_tokens_come_where_none_are_asked_for(serve):
    async with serve(FakeFleet("a")) as served:
        answer = await served.client.completions.create(model=MODEL, prompt="hello", seed=0)
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        (["ab", "cd"], ["ab", "cd"]),
        ([0, 1], ["ab"]),
        ([[0, 1], [2, 3, 4]], ["ab", "cde"]),
    ],
)
async def test_prompts_come_as_texts_or_token_ids_one_or_many(serve, prompt, prompts):
    async with serve(FakeFleet("a")) as served:
        answer = await served.client.completions.create(model=MODEL, prompt=prompt, max_tokens=5, seed=1)
    assert [choice.text for choice in answer.choices] == [expected(ids(text), 1, 5) for text in prompts]
    assert answer.usage.prompt_tokens == sum(map(len, prompts))


async def test_n_choices_draw_from_seeds_that_follow_each_other(serve):
    async with serve(FakeFleet("a")) as served:
        answer = await served.client.completions.create(model=MODEL, prompt=["ab", "c"], n=2, max_tokens=5, seed=7)
    assert [choice.text for choice in answer.choices] == [expected(ids(text), seed, 5) for text in ("ab", "c") for seed in (7, 8)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 20)


async def test_logprobs_name_each_token_its_alternatives_and_its_offset(serve):
    async with serve(FakeFleet("a")) as served:
        answer = await served.client.completions.create(model=MODEL, prompt="ab", max_tokens=3, seed=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == list(expected(ids("ab"), 0, 3))
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.top_logprobs == [{"a": 0.0, "b": -1.0} | {token: -0.5} for token in logprobs.tokens]
    assert logprobs.text_offset == [0, 1, 2]


async def test_every_sampling_parameter_reaches_the_worker(serve):
    fleet = FakeFleet("a")
    async with serve(fleet) as served:
        await served.client.completions.create(
            model=MODEL,
            prompt="ab",
            max_tokens=9,
            temperature=0.5,
            top_p=0.9,
            presence_penalty=0.1,
            frequency_penalty=0.2,
            stop=["x", "yz"],
            seed=5,
            user="somebody",
            extra_body={
                "top_k": 7,
                "min_tokens": 2,
                "repetition_penalty": 1.1,
                "stop_token_ids": [4],
                "ignore_eos": True,
                "priority": 3,
                "slo_class": "batch",
            },
        )
    request = fleet.workers["a"].submits[0].request
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (9, 2, 0.5, 0.9, 7)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (sampling.stop, sampling.stop_token_ids, sampling.ignore_eos, sampling.seed) == (("x", "yz"), (4,), True, 5)
    assert (request.priority, request.slo_class, request.prompt) == (3, "batch", ids("ab"))


async def test_a_nucleus_of_nothing_is_the_likeliest_token(serve):
    fleet = FakeFleet("a")
    async with serve(fleet) as served:
        await served.client.completions.create(model=MODEL, prompt="ab", max_tokens=1, top_p=0)
    sampling = fleet.workers["a"].submits[0].request.sampling
    assert (sampling.top_p, sampling.top_k) == (1.0, 1)


async def test_requests_without_a_seed_draw_unlike_ones(serve):
    fleet = FakeFleet("a")
    async with serve(fleet) as served:
        for _ in range(2):
            await served.client.completions.create(model=MODEL, prompt="ab", max_tokens=1)
    first, second = (submit.request.sampling.seed for submit in fleet.workers["a"].submits)
    assert first != second


async def test_a_long_text_is_encoded_like_a_short_one(serve):
    fleet = FakeFleet("a", context_tokens=10_000)
    text = LETTERS[:26] * 200
    async with serve(fleet) as served:
        answer = await served.client.completions.create(model=MODEL, prompt=text, max_tokens=4, seed=0)
    assert answer.usage.prompt_tokens == len(text)
    assert answer.choices[0].text == expected(ids(text), 0, 4)


async def test_many_streams_at_once_keep_their_tokens_apart(serve):
    async def ask(served, text: str) -> str:
        stream = await served.client.completions.create(model=MODEL, prompt=text, max_tokens=30, seed=0, stream=True)
        return "".join([event.choices[0].text async for event in stream])

    texts = [LETTERS[row % 20 : row % 20 + 3] + LETTERS[row // 20] for row in range(60)]
    async with serve(FakeFleet("a", "b", "c")) as served:
        answers = await asyncio.gather(*(ask(served, text) for text in texts))
    assert answers == [expected(ids(text), 0, 30) for text in texts]


async def test_models_are_listed_and_shown(serve):
    async with serve(FakeFleet("a")) as served:
        assert [model.id async for model in served.client.models.list()] == [MODEL]
        assert (await served.client.models.retrieve(MODEL)).owned_by == "mobula"
        with pytest.raises(openai.NotFoundError):
            await served.client.models.retrieve("org/unknown")
