from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kv import KvCleared, KvRemoved, KvStored
from cluster.replica import Phase, Role
from policies.cells import BLOCKS_USED, KV_TOKENS, SEQUENCES, WAITING_TOKENS
from policies.routing_view import FleetView

NOW_S = 1.5


@pytest.fixture
def pair(small) -> FleetView:
    """A prefill replica `p` and a busy decode replica `d`, so that long prompts are prefilled remotely."""
    fleet = FleetView()
    fleet.membership([small.replica("p", Role.PREFILL), small.replica("d", Role.DECODE)], 1.0)
    fleet.report(small.load("p"), 1.0)
    fleet.report(small.load("d", running=8, kv_tokens=800, kv_blocks_used=64), 1.0)
    return fleet


def load_of(fleet: FleetView, replica_id: str) -> tuple[float, ...]:
    view = fleet.routing_view("m", NOW_S)
    return tuple(view.rows[view.row_of[replica_id], [SEQUENCES, WAITING_TOKENS, KV_TOKENS, BLOCKS_USED]].tolist())


def sent(fleet: FleetView, router, ask, now_s: float = NOW_S):
    route = router.route(ask, fleet.routing_view("m", now_s))
    fleet.charge(ask, 0, route, now_s)
    return route


def test_a_charge_weighs_at_once_on_both_replicas(pair, small, router):
    sent(pair, router, small.ask(prompt_tokens=1600, expected_output_tokens=64))
    assert load_of(pair, "p") == (1, 1600, 1600, 100)
    assert load_of(pair, "d") == (9, 0, 2400, 168)


def test_the_first_token_frees_the_prefill_replica(pair, small, router):
    sent(pair, router, small.ask(prompt_tokens=1600))
    pair.first_token("r", 0, 2.0)
    assert load_of(pair, "p") == (0, 0, 0, 0)
    assert load_of(pair, "d")[0] == 9


@settings(deadline=None)
@given(
    prompts=st.lists(st.integers(1, 3000), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
    first_tokens=st.sets(st.integers(0, 5)),
)
def test_charges_then_settlements_restore_the_view_exactly(small, router, prompts, order, first_tokens):
    fleet = FleetView()
    fleet.membership([small.replica("p", Role.PREFILL), small.replica("a"), small.replica("d", Role.DECODE)], 1.0)
    fleet.report(small.load("a", running=2, waiting_tokens=77, kv_tokens=500, kv_blocks_used=40), 1.0)
    before = fleet.routing_view("m", NOW_S).rows.copy()
    for number, tokens in enumerate(prompts):
        sent(fleet, router, small.ask(str(number), tokens))
    for number in first_tokens:
        fleet.first_token(str(number), 0, 2.0)
    numbers = list(range(len(prompts)))
    order.shuffle(numbers)
    for number in numbers:
        fleet.settle(str(number), 0, 2.0)
    assert np.array_equal(fleet.routing_view("m", NOW_S).rows, before)
    assert fleet.in_flight == 0


def test_a_newer_report_takes_a_charge_over(pair, small, router):
    sent(pair, router, small.ask(prompt_tokens=1600))
    pair.report(small.load("p", 2, at_s=1.7, waiting=1, waiting_tokens=900, kv_blocks_used=44), 1.7)
    assert load_of(pair, "p") == (1, 900, 900, 44)
    pair.first_token("r", 0, 1.8)
    assert load_of(pair, "p") == (1, 900, 900, 44)


def test_a_charge_sent_after_the_reports_time_still_counts(pair, small, router):
    sent(pair, router, small.ask(prompt_tokens=1600))
    pair.report(small.load("p", 2, at_s=1.4), 1.6)
    assert load_of(pair, "p") == (1, 1600, 1600, 100)


def test_a_settled_request_is_taken_off_a_report_that_counted_it(pair, small, router):
    sent(pair, router, small.ask(prompt_tokens=1600, expected_output_tokens=64))
    pair.report(small.load("d", 2, at_s=1.7, running=9, kv_tokens=2410, kv_blocks_used=168), 1.7)
    pair.settle("r", 0, 1.8)
    assert load_of(pair, "d") == (8, 0, 810, 64)


def test_reports_out_of_order_are_dropped(pair, small):
    pair.report(small.load("d", 5, running=3), 2.0)
    pair.report(small.load("d", 4, running=7), 2.1)
    assert load_of(pair, "d")[0] == 3
    assert pair.load("d").sequence == 5


def test_a_suspect_gets_nothing_until_it_reports_again(small, router):
    fleet = FleetView()
    fleet.membership([small.replica("a"), small.replica("b")], 1.0)
    fleet.suspect_worker("worker-of-a", 1.1)
    chosen = {router.route(small.ask(str(n)), fleet.routing_view("m", NOW_S)).decode.replica_id for n in range(20)}
    assert chosen == {"b"}
    fleet.report(small.load("a"), 1.6)
    chosen = {router.route(small.ask(str(n)), fleet.routing_view("m", NOW_S)).decode.replica_id for n in range(20)}
    assert chosen == {"a", "b"}


def test_a_drain_holds_whoever_says_it_first(small, router):
    fleet = FleetView()
    fleet.membership([small.replica("a"), small.replica("b", phase=Phase.DRAINING)], 1.0)
    fleet.report(small.load("a", phase=Phase.DRAINING), 1.0)
    fleet.report(small.load("b"), 1.0)
    assert router.route(small.ask(), fleet.routing_view("m", NOW_S)).retry_after_s == router.retry_s


def test_a_lost_replicas_row_goes_to_the_next_without_its_past(small, router):
    fleet = FleetView()
    fleet.membership([small.replica("a")], 1.0)
    fleet.kv_events("a", 1, [KvCleared(), KvStored(parent=None, hashes=(1, 2), tokens=())])
    sent(fleet, router, small.ask())
    fleet.membership([small.replica("b")], 2.0)
    fleet.settle("r", 0, 2.0)
    fleet.report(small.load("a", 9, running=5), 2.0)
    assert fleet.replica("a") is None
    assert load_of(fleet, "b") == (0, 0, 0, 0)
    assert fleet.routing_view("m", 2.0).index.match((1, 2)) == []
    assert fleet.in_flight == 0


def test_a_charge_outlives_its_prefill_replica(pair, small, router):
    sent(pair, router, small.ask(prompt_tokens=1600))
    pair.membership([small.replica("d", Role.DECODE)], 2.0)
    pair.first_token("r", 0, 2.0)
    pair.settle("r", 0, 2.0)
    assert load_of(pair, "d") == (8, 0, 800, 64)


def depth(fleet: FleetView, hashes: tuple[int, ...]) -> list[tuple[int, int]]:
    return fleet.routing_view("m", NOW_S).index.match(hashes)


def stored(*hashes: int) -> KvStored:
    return KvStored(parent=None, hashes=hashes, tokens=())


def test_a_gap_in_block_events_is_told_once_and_healed_by_a_clear(small):
    fleet = FleetView()
    fleet.membership([small.replica("a")], 1.0)
    assert fleet.kv_events("a", 7, [KvCleared(), stored(1)])
    assert fleet.kv_events("a", 8, [stored(2)])
    assert not fleet.kv_events("a", 10, [stored(4)])
    assert fleet.kv_events("a", 11, [KvRemoved(hashes=(1,))])
    assert depth(fleet, (1, 2)) == [(2, 1)]
    assert fleet.kv_events("a", 12, [KvCleared(), stored(5)])
    assert depth(fleet, (1, 2)) == []
    assert fleet.kv_events("a", 13, [stored(6)])
    assert not fleet.kv_events("a", 15, [stored(7)])
    assert depth(fleet, (5, 6)) == [(2, 1)]


def test_events_without_a_beginning_ask_for_one(small):
    fleet = FleetView()
    fleet.membership([small.replica("a")], 1.0)
    assert not fleet.kv_events("a", 41, [stored(1)])
    assert depth(fleet, (1,)) == []


def test_a_repeated_event_message_changes_nothing(small):
    fleet = FleetView()
    fleet.membership([small.replica("a")], 1.0)
    fleet.kv_events("a", 1, [KvCleared(), stored(1)])
    fleet.kv_events("a", 2, [KvRemoved(hashes=(1,))])
    assert fleet.kv_events("a", 2, [stored(9)])
    assert depth(fleet, (9,)) == []
