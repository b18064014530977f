"""Whole prompts beside decodes, as on Splitwise's machines: prompts first come first served, decodes in the room they leave."""

from __future__ import annotations

import math

import msgspec
import pytest

from cluster.performance import causal_pairs
from cluster.step_table import StepTable, step_table_of
from simulator.engines import Engines
from simulator.steps.records import FINISHED, WHOLE_PROMPTS
from tests.simulator.alike import PERFORMANCE

TABLE = msgspec.structs.replace(step_table_of(PERFORMANCE), mixed_factor=1.1)


def played(*requests: tuple[float, int, int], table: StepTable = TABLE) -> tuple[list[tuple[float, float]], Engines]:
    """(at_s, prompt, output) on one engine with a budget of 2048 tokens: when each had its first and last token."""
    engines = Engines()
    engine = engines.add(
        model=engines.model(table),
        kv_blocks=100_000,
        block_tokens=1,
        max_running=512,
        step_budget_tokens=2048,
        batching=WHOLE_PROMPTS,
    )
    rows = []
    for at_s, prompt, output in requests:
        engines.advance(at_s)
        rows.append(engines.request(arrival_s=at_s, prompt=prompt, output=output))
        engines.submit(rows[-1], engine, at_s, at_s)
    engines.advance(math.inf)
    assert [said.kind for said in engines.take_said()].count(FINISHED) == len(rows)
    return [(float(engines.state.requests["first_s"][row]), float(engines.state.requests["last_s"][row])) for row in rows], engines


def alone_s(prompt: int) -> float:
    return TABLE.step_time_s(prompt, causal_pairs(0, prompt), 0, 0)


def decodes_s(context: int, steps: int) -> float:
    return TABLE.decode_span_s(1, context, steps)


def test_a_prompt_beside_decodes_takes_the_factor_of_as_many_prompt_tokens() -> None:
    [(first_s, last_s), (other_s, _)], _ = played((0.0, 1000, 3), (1e-3, 1000, 1))
    assert first_s == pytest.approx(alone_s(1000))
    mixed_s = TABLE.step_time_s(1000, causal_pairs(0, 1000), 1, 1001)
    assert mixed_s == pytest.approx(1.1 * (alone_s(1000) + PERFORMANCE.prefill_token_s))
    assert other_s == pytest.approx(first_s + mixed_s)
    assert last_s == pytest.approx(other_s + decodes_s(1002, 1))


def test_a_prompt_that_fills_the_budget_makes_decodes_wait_and_is_no_mixed_step() -> None:
    [(first_s, last_s), (other_s, _)], _ = played((0.0, 1000, 3), (1e-3, 2048, 1))
    assert other_s == pytest.approx(first_s + alone_s(2048))
    assert last_s == pytest.approx(other_s + decodes_s(1001, 2))


def test_a_prompt_that_leaves_room_for_the_decodes_does_not_make_them_wait() -> None:
    [(first_s, last_s), (other_s, _)], _ = played((0.0, 1000, 3), (1e-3, 2047, 1))
    assert other_s == pytest.approx(first_s + TABLE.step_time_s(2047, causal_pairs(0, 2047), 1, 1001))
    assert last_s == pytest.approx(other_s + decodes_s(1002, 1))


def test_prompts_are_taken_in_order_while_they_fit_together() -> None:
    times, _ = played((0.0, 1500, 1), (0.0, 600, 1), (0.0, 400, 1))
    assert times[0][0] == pytest.approx(alone_s(1500))
    assert (
        times[1][0]
        == times[2][0]
        == pytest.approx(times[0][0] + TABLE.step_time_s(1000, causal_pairs(0, 600) + causal_pairs(0, 400), 0, 0))
    )


def test_every_token_is_counted_once_where_decodes_wait() -> None:
    _, engines = played(*((0.01 * n, 300 + 97 * n % 3000, 1 + n % 40) for n in range(200)))
    assert engines.work(0, 1e6).output_tokens == sum(1 + n % 40 for n in range(200))
    assert engines.state.engines["used"][0] == 0
