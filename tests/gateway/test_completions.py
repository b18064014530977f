from __future__ import annotations

from tests.gateway.fake_fleet import MODEL, FakeFleet, expected, ids


async def test_a_streamed_completion_has_one_event_a_token_and_usage_at_the_end(serve):
    async with serve(FakeFleet("a")) as served:
        stream = await served.client.completions.create(
            model=MODEL, prompt="hello", max_tokens=12, seed=3, stream=True, stream_options={"include_usage": True}
        )
        events = [event async for event in stream]
    *tokens, usage = events
    assert [len(event.choices) for event in tokens] == [1] * 12
    assert "".join(event.choices[0].text for event in tokens) == expected(ids("hello"), 3, 12)
    assert tokens[-1].choices[0].finish_reason == "length"
    assert (usage.choices, usage.usage.prompt_tokens, usage.usage.completion_tokens) == ([], 5, 12)
