"""`/v1/chat/completions` as the official client sees it."""

from __future__ import annotations

from tests.gateway.fake_fleet import CONTEXT_TOKENS, MODEL, FakeFleet, expected, ids

MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
RENDERED = ids("s be kind.u hi.")


async def test_a_chat_stream_names_the_role_then_tokens_then_the_finish(serve):
    async with serve(FakeFleet("a")) as served:
        stream = await served.client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_completion_tokens=6, seed=2, stream=True, stream_options={"include_usage": True}
        )
        role, *tokens, finish, usage = [event async for event in stream]
    assert role.choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content for event in tokens) == expected(RENDERED, 2, 6)
    assert len(tokens) == 6
    assert finish.choices[0].finish_reason == "length"
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (len(RENDERED), 6)


async def test_a_whole_chat_answer_equals_its_stream(serve):
    async with serve(FakeFleet("a")) as served:
        answer = await served.client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=6, seed=2, n=2)
    assert [choice.message.content for choice in answer.choices] == [expected(RENDERED, seed, 6) for seed in (2, 3)]
    assert answer.object == "chat.completion"


async def test_chat_may_fill_the_context_where_no_bound_is_given(serve):
    async with serve(FakeFleet("a")) as served:
        answer = await served.client.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.usage.total_tokens == CONTEXT_TOKENS


async def test_chat_logprobs_name_each_token_and_its_alternatives(serve):
    async with serve(FakeFleet("a")) as served:
        answer = await served.client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=3, seed=0, logprobs=True, top_logprobs=2
        )
        plain = await served.client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1, seed=0, logprobs=True)
    content = answer.choices[0].logprobs.content
    assert [one.token for one in content] == list(expected(RENDERED, 0, 3))
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("a", 0.0), ("b", -1.0)]
    assert bytes(content[0].bytes).decode() == content[0].token
    assert plain.choices[0].logprobs.content[0].top_logprobs == []


async def test_an_answer_may_be_sent_back_as_the_client_holds_it(serve):
    fleet = FakeFleet("a")
    async with serve(fleet) as served:
        first = await served.client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3, seed=0)
        answer = first.choices[0].message
        for said in (answer, answer.model_dump()):
            await served.client.chat.completions.create(
                model=MODEL, messages=[*MESSAGES, said, {"role": "user", "content": "go on"}], max_tokens=3
            )
    prompts = [submit.request.prompt for submit in fleet.workers["a"].submits]
    assert prompts[1:] == [ids(f"s be kind.u hi.a {answer.content}.u go on.")] * 2


async def test_hints_that_change_no_answer_are_taken(serve):
    async with serve(FakeFleet("a")) as served:
        plain = await served.client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3, seed=0)
        hinted = await served.client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=3,
            seed=0,
            prompt_cache_key="k",
            prompt_cache_retention="in_memory",
            safety_identifier="s",
            service_tier="auto",
            user="u",
        )
    assert hinted.choices[0].message.content == plain.choices[0].message.content
