"""Mooncake's cluster: what is cached is found, what is far is fetched, what does not fit is refused, and stalls are counted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cluster.record import TraceRow
from reproductions.mooncake import trace_rows
from reproductions.mooncake.cluster import Cluster, Design
from reproductions.mooncake.lru import hit_rate
from reproductions.mooncake.machines import step_times
from reproductions.mooncake.mixed import Mixed, _joined
from reproductions.mooncake.served import Served, attained, worst_gaps_s
from reproductions.mooncake.served import hit_rate as found

TIMES = step_times(1.0)


def row(arrival_s: float, blocks: tuple[int, ...], output: int = 20) -> TraceRow:
    return TraceRow(
        arrival_s=arrival_s, prompt_tokens=512 * len(blocks), output_tokens=output, block_hashes=blocks, block_tokens=512
    )


def run(rows: list[TraceRow], **design: object) -> Cluster:
    made = Cluster(Design(**{"prompt_nodes": 2, "decode_nodes": 1, **design}), TIMES)  # type: ignore[arg-type]
    made.run(rows)
    return made


def test_the_trace_has_as_much_to_find_again_as_its_facts_say(data_dir: Path) -> None:
    assert hit_rate(trace_rows(data_dir), None) == pytest.approx(0.374, abs=5e-4)


def test_a_small_cache_drops_what_was_used_least_recently() -> None:
    rows = [row(0.0, (1, 2)), row(1.0, (3, 4)), row(2.0, (1, 2))]
    assert hit_rate(rows, None) == pytest.approx(2 / 6)
    assert hit_rate(rows, 2) == 0.0


def test_a_prefix_on_another_node_is_fetched_only_by_a_cache_of_all_nodes() -> None:
    shared = tuple(range(20))
    # The first node has the prefix and is then busy with a long prompt when the second request comes.
    rows = [row(0.0, shared), row(20.0, (*shared, *range(100, 180))), row(20.1, (*shared, 900))]
    cached = {sharing: sum(each.cached for each in run(rows, sharing=sharing).served) for sharing in ("local", "global")}
    # Of a prompt's last block a token is always computed: it is not kept.
    assert cached == {"local": 19 * 512, "global": 2 * 19 * 512}


def test_fetched_blocks_stay_on_the_node_that_fetched_them() -> None:
    made = run([row(0.0, tuple(range(20))), row(20.0, (*range(20), *range(100, 180))), row(20.1, (*range(20), 900))])
    assert all({*range(19)} <= node.blocks for node in made.prompts.nodes)


def test_one_cache_finds_no_less_than_caches_of_their_own(data_dir: Path) -> None:
    trace = trace_rows(data_dir, 800)
    rates = []
    for sharing in ("balanced", "local", "global"):
        made = Cluster(Design(prompt_nodes=10, decode_nodes=6, sharing=sharing), TIMES)  # type: ignore[arg-type]
        made.run(trace)
        rates.append(found(made.served))
    assert rates[0] < rates[1] <= rates[2] <= hit_rate(trace, None)


@pytest.mark.parametrize("admission", ["none", "late", "present", "predicted"])
def test_every_request_is_served_or_refused_once(admission: str, data_dir: Path) -> None:
    trace = trace_rows(data_dir, 700)
    made = Cluster(Design(prompt_nodes=5, decode_nodes=1, admission=admission), TIMES)  # type: ignore[arg-type]
    made.run(trace, 4.0)
    assert sorted(each.prompt for each in made.served) == sorted(each.prompt_tokens for each in trace)
    assert any(each.rejected for each in made.served) == (admission != "none")


def test_looking_ahead_computes_fewer_prompts_in_vain(data_dir: Path) -> None:
    trace, late = trace_rows(data_dir, 2000), {}
    for admission in ("late", "predicted"):
        made = Cluster(Design(prompt_nodes=8, decode_nodes=1, admission=admission), TIMES)  # type: ignore[arg-type]
        made.run(trace, 3.0)
        late[admission] = sum(each.late for each in made.served)
    assert late["predicted"] < late["late"]


def test_prompts_stall_decodes_on_nodes_that_do_both() -> None:
    rows = [row(0.0, (1, 2), output=200), *(row(2.0 + i, tuple(range(100 * i + 50, 100 * i + 90))) for i in range(3))]
    alone = Mixed(1, TIMES, caching=False).run(rows[:1])[0].tbt_s
    stalled = next(each for each in Mixed(1, TIMES, caching=False).run(rows) if each.prompt == 1024)
    assert stalled.tbt_s > 5 * alone


def test_steps_of_prompts_without_a_decode_between_them_are_one_stall() -> None:
    assert _joined([(2.0, 3.0), (0.0, 1.0), (1.0, 1.5), (0.0, 1.0)]) == [(0.0, 1.5), (2.0, 3.0)]


def test_tbt_is_the_mean_of_the_worst_tenth_of_gaps() -> None:
    assert worst_gaps_s(2.0, 20, ()) == pytest.approx(0.1)
    assert worst_gaps_s(2.0 + 3.0, 20, (1.0, 2.0)) == pytest.approx(0.1 + 1.5)
    assert worst_gaps_s(0.0, 0, ()) == 0.0


def test_a_refused_request_keeps_no_bound() -> None:
    kept, refused = Served(10, 0, 1.0, 0.05), Served(10, 0, math.inf, math.inf)
    assert attained([kept, refused], ttft_s=30.0, tbt_s=0.1) == 0.5
