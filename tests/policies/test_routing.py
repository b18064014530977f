from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidConfig
from cluster.kv import KvCleared, KvStored
from cluster.performance import PerformanceModel
from cluster.replica import Phase, Role
from policies.route import Rejection, Route
from policies.routing import TERMS, PredictedLatencyRouter
from policies.routing_view import FleetView

NOW_S = 1.5


def fleet_of(replicas, loads=()) -> FleetView:
    fleet = FleetView()
    fleet.membership(replicas, 1.0)
    for load in loads:
        fleet.report(load, 1.0)
    return fleet


def holds(fleet: FleetView, replica_id: str, hashes: tuple[int, ...]) -> None:
    fleet.kv_events(replica_id, 1, [KvCleared(), KvStored(parent=None, hashes=hashes, tokens=())])


@st.composite
def fleets(draw, roles=tuple(Role)):
    """(role, phase, model, running, waiting tokens) of each replica."""
    one = st.tuples(
        st.sampled_from(roles),
        st.sampled_from([Phase.READY, Phase.READY, Phase.READY, Phase.DRAINING, Phase.STARTING]),
        st.sampled_from(["m", "m", "m", "other"]),
        st.integers(0, 20),
        st.integers(0, 4000),
    )
    return draw(st.lists(one, min_size=1, max_size=8))


def build(small, drawn) -> FleetView:
    """Replicas r0, r1, ..."""
    replicas, loads = [], []
    for number, (role, phase, model, running, waiting) in enumerate(drawn):
        replicas.append(small.replica(f"r{number}", role, phase=phase, model=model))
        used = {"running": running, "waiting_tokens": waiting, "kv_tokens": 300 * running, "kv_blocks_used": 20 * running}
        loads.append(small.load(f"r{number}", phase=phase, **used))
    return fleet_of(replicas, loads)


def named(route: Route | Rejection) -> set[str]:
    if isinstance(route, Rejection):
        return set()
    return {choice.replica_id for choice in (route.decode, route.prefill) if choice}


@settings(deadline=None)
@given(drawn=fleets(), request_id=st.text(max_size=8), tokens=st.integers(1, 4000))
def test_the_same_request_and_view_give_the_same_answer(small, router, drawn, request_id, tokens):
    ask = small.ask(request_id, tokens)
    first, second = (router.route(ask, build(small, drawn).routing_view("m", NOW_S)) for _ in range(2))
    assert msgspec.to_builtins(first, enc_hook=dict) == msgspec.to_builtins(second, enc_hook=dict)


@settings(deadline=None)
@given(drawn=fleets(), excluded=st.frozensets(st.integers(0, 7)), tokens=st.integers(1, 4000))
def test_only_ready_replicas_of_the_model_that_are_not_excluded_are_chosen(small, router, drawn, excluded, tokens):
    names = frozenset(f"r{number}" for number in excluded)
    route = router.route(small.ask("r", tokens, excluded=names), build(small, drawn).routing_view("m", NOW_S))
    for name in named(route):
        _, phase, model, *_ = drawn[int(name[1:])]
        assert phase is Phase.READY
        assert model == "m"
        assert name not in names
    if isinstance(route, Route):
        assert drawn[int(route.decode.replica_id[1:])][0] is not Role.PREFILL
        assert route.prefill is None or drawn[int(route.prefill.replica_id[1:])][0] is not Role.DECODE
        assert route.prefill is None or route.prefill.replica_id != route.decode.replica_id


UNLIKE = st.tuples(
    st.sampled_from(Role),
    st.sampled_from([0.2, 1.0, 5.0]),
    st.sampled_from([0.1, 1.0, 10.0]),
    st.sampled_from(["", "h1", "h2"]),
    st.integers(0, 16),
    st.integers(0, 4000),
    st.integers(0, 60),
)
"""Role, decode and prefill times of the usual, host, running, waiting tokens, cached blocks."""


def build_unlike(small, drawn, number: int, more: tuple[int, int]) -> FleetView:
    """Replicas r0, r1, ... unlike each other in everything; one has `more` (running, waiting tokens)."""
    replicas, loads = [], []
    for row, (role, decode, prefill, host, running, waiting, _) in enumerate(drawn):
        added, tokens = more if row == number else (0, 0)
        times = PerformanceModel(
            step_s=0.01 * decode, prefill_token_s=1e-4 * prefill, sequence_s=1e-4 * decode, kv_token_s=1e-7 * decode
        )
        replicas.append(small.replica(f"r{row}", role, performance=times, host_id=host))
        used = {"running": running + added, "kv_tokens": 300 * (running + added), "kv_blocks_used": 20 * (running + added)}
        loads.append(small.load(f"r{row}", waiting_tokens=waiting + tokens, **used))
    fleet = fleet_of(replicas, loads)
    for row, (*_, cached) in enumerate(drawn):
        if cached:
            holds(fleet, f"r{row}", tuple(range(cached)))
    return fleet


@settings(max_examples=300, deadline=None)
@given(
    drawn=st.lists(UNLIKE, min_size=1, max_size=6),
    number=st.integers(0, 5),
    more=st.tuples(st.integers(0, 5), st.integers(0, 2000)),
    tokens=st.integers(1, 2000),
    slo=st.fixed_dictionaries({"ttft_slo_s": st.none() | st.just(0.5), "tpot_slo_s": st.none() | st.just(0.02)}),
)
def test_more_load_on_a_replica_never_attracts_a_request_to_it(small, router, drawn, number, more, tokens, slo):
    ask = small.ask("r", tokens, block_hashes=tuple(range(tokens // 16)), **slo)
    before = named(router.route(ask, build_unlike(small, drawn, number, (0, 0)).routing_view("m", NOW_S)))
    after = named(router.route(ask, build_unlike(small, drawn, number, more).routing_view("m", NOW_S)))
    assert f"r{number}" in before or f"r{number}" not in after


@settings(deadline=None)
@given(drawn=fleets(), tokens=st.integers(1, 4000))
def test_the_score_is_the_sum_of_its_terms_and_never_worse_than_the_runner_ups(small, router, drawn, tokens):
    ask = small.ask("r", tokens)
    route = router.route(ask, build(small, drawn).routing_view("m", NOW_S))
    if isinstance(route, Rejection):
        return
    for choice in (route.decode, route.decode_runner_up, route.prefill, route.prefill_runner_up):
        if choice is not None:
            terms = choice.terms
            assert set(terms) == set(TERMS)
            parts = terms["ttft_s"] + ask.expected_output_tokens * terms["tpot_s"] + terms["burden_s"] + terms["slo_miss_s"]
            assert choice.score == pytest.approx(parts)
    if route.decode_runner_up is not None:
        assert route.decode.score <= route.decode_runner_up.score


def test_predictions_are_those_of_the_performance_model(small, router):
    fleet = fleet_of([small.replica("a")], [small.load("a", running=3, kv_tokens=900)])
    route = router.route(small.ask(prompt_tokens=400, expected_output_tokens=64), fleet.routing_view("m", NOW_S))
    performance = fleet.replica("a").performance
    assert route.predicted_tpot_s == pytest.approx(performance.decode_step_s(4, 900 + 400 + 32))
    beside_s = 3 * performance.sequence_s + 900 * performance.kv_token_s
    assert route.predicted_ttft_s == pytest.approx(performance.step_s + beside_s + 400 * performance.prefill_token_s)


def test_a_long_prompt_is_prefilled_away_from_a_busy_decode_replica(small, router):
    fleet = fleet_of([small.replica("p", Role.PREFILL), small.replica("d", Role.DECODE)], [small.load("d", running=8)])
    route = router.route(small.ask(prompt_tokens=4000), fleet.routing_view("m", NOW_S))
    assert (route.prefill.replica_id, route.decode.replica_id) == ("p", "d")
    assert route.reason.startswith("remote prefill is cheaper")


def test_a_short_prompt_is_prefilled_where_it_is_decoded(small, router):
    fleet = fleet_of([small.replica("p", Role.PREFILL), small.replica("d", Role.DECODE)], [small.load("d", running=2)])
    route = router.route(small.ask(prompt_tokens=8), fleet.routing_view("m", NOW_S))
    assert route.prefill is None
    assert route.reason.startswith("8 uncached tokens are cheaper here")
    assert route.prefill_runner_up.replica_id == "p"


def test_a_mostly_cached_prompt_is_prefilled_where_its_cache_is(small, router):
    fleet = fleet_of([small.replica("p", Role.PREFILL), small.replica("d", Role.DECODE)], [small.load("d", running=8)])
    hashes = tuple(range(1, 251))
    holds(fleet, "d", hashes[:249])
    route = router.route(small.ask(prompt_tokens=4000, block_hashes=hashes), fleet.routing_view("m", NOW_S))
    assert route.prefill is None
    assert (route.cached_tokens, route.uncached_tokens) == (249 * 16, 16)


def test_a_wholly_cached_prompt_still_computes_its_last_block(small, router):
    fleet = fleet_of([small.replica("a")])
    holds(fleet, "a", (1, 2))
    route = router.route(small.ask(prompt_tokens=32, block_hashes=(1, 2)), fleet.routing_view("m", NOW_S))
    assert (route.cached_tokens, route.uncached_tokens) == (16, 16)


def test_the_replica_that_holds_the_prefix_is_preferred_among_equals(small, router):
    fleet = fleet_of([small.replica(name) for name in "abc"])
    holds(fleet, "b", tuple(range(1, 33)))
    for request_id in "uvwxyz":
        route = router.route(small.ask(request_id, 600, block_hashes=tuple(range(1, 38))), fleet.routing_view("m", NOW_S))
        assert route.decode.replica_id == "b"


def test_a_prompt_is_prefilled_at_the_decode_replica_when_no_prefill_replica_is_left(small, router):
    fleet = fleet_of([small.replica("p", Role.PREFILL), small.replica("d", Role.DECODE)], [small.load("d", running=8)])
    fleet.suspect("p", NOW_S)
    route = router.route(small.ask(prompt_tokens=4000), fleet.routing_view("m", NOW_S))
    assert (route.prefill, route.reason) == (None, "no prefill replica")


def test_engines_without_a_kv_layout_prefill_where_they_decode(small, router):
    replicas = [small.replica("p", Role.MIXED, layout=None), small.replica("d", Role.DECODE, layout=None)]
    fleet = fleet_of(replicas, [small.load("p", running=8), small.load("d", running=8)])
    assert router.route(small.ask(prompt_tokens=4000), fleet.routing_view("m", NOW_S)).prefill is None


def test_kv_goes_by_shared_memory_where_hosts_are_the_same(small):
    router = PredictedLatencyRouter(link_bytes_per_s=1e6)
    replicas = [small.replica("far", Role.PREFILL, host_id="x"), small.replica("near", Role.PREFILL, host_id="y")]
    fleet = fleet_of([*replicas, small.replica("d", Role.DECODE, host_id="y")], [small.load("d", running=12)])
    assert router.route(small.ask(prompt_tokens=4000), fleet.routing_view("m", NOW_S)).prefill.replica_id == "near"


def test_a_replica_that_keeps_the_slo_goes_before_a_cheaper_one_that_misses_it(small, router):
    slow_start = small.load("a", waiting_tokens=6000)
    slow_steps = small.load("b", running=14, kv_tokens=100_000)
    fleet = fleet_of([small.replica(name, layout=None) for name in "ab"], [slow_start, slow_steps])
    view = fleet.routing_view("m", NOW_S)
    assert router.route(small.ask(tpot_slo_s=0.015), view).decode.replica_id == "a"
    assert router.route(small.ask(ttft_slo_s=0.3), view).decode.replica_id == "b"


def test_equal_replicas_share_requests(small, router):
    view = fleet_of([small.replica(name) for name in "abcd"]).routing_view("m", NOW_S)
    chosen = [router.route(small.ask(f"request-{number}"), view).decode.replica_id for number in range(400)]
    assert all(60 < chosen.count(name) < 140 for name in "abcd")


def test_replicas_that_state_no_times_still_share_by_load(small, router):
    unpaced = msgspec.structs.replace(small.replica("a").performance, step_s=0, prefill_token_s=0, sequence_s=0, kv_token_s=0)
    fleet = fleet_of([small.replica(name, performance=unpaced) for name in "ab"], [small.load("a", running=3)])
    assert router.route(small.ask(), fleet.routing_view("m", NOW_S)).decode.replica_id == "b"


def test_a_silent_replica_is_left_out(small, router):
    fleet = fleet_of([small.replica("a"), small.replica("b")])
    fleet.report(small.load("b"), 4.0)
    for number in range(20):
        assert router.route(small.ask(str(number)), fleet.routing_view("m", 5.0)).decode.replica_id == "b"


def share_of(small, router, fleet, name: str, now_s: float) -> float:
    for replica_id in "ab":
        fleet.report(small.load(replica_id, sequence=int(now_s), at_s=now_s), now_s)
    view = fleet.routing_view("m", now_s)
    routes = [router.route(small.ask(f"request-{number}"), view) for number in range(500)]
    return sum(route.decode.replica_id == name for route in routes) / len(routes)


def test_a_newcomers_share_grows_over_the_ramp(small, router):
    fleet = fleet_of([small.replica("a"), small.replica("b", ready_since_s=100.0)])
    shares = [share_of(small, router, fleet, "b", now_s) for now_s in (100.0, 110.0, 120.0, 130.0)]
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert shares[3] == pytest.approx(0.5, abs=0.1)


def test_a_fleet_that_starts_as_a_whole_has_no_newcomers(small, router):
    fleet = fleet_of([small.replica("a", ready_since_s=90.0), small.replica("b", ready_since_s=100.0)])
    assert share_of(small, router, fleet, "b", 101.0) == pytest.approx(0.5, abs=0.1)


def test_a_newcomer_is_taken_when_nobody_else_is_left(small, router):
    fleet = fleet_of([small.replica("a"), small.replica("b", ready_since_s=100.0)])
    fleet.report(small.load("b", at_s=100.0), 100.0)
    route = router.route(small.ask(excluded=frozenset("a")), fleet.routing_view("m", 100.0))
    assert route.decode.replica_id == "b"
    assert route.decode.terms["held_back"] == 1.0


def test_a_request_that_no_replica_could_hold_is_rejected_for_good(small, router):
    fleet = fleet_of([small.replica("a", kv_blocks=100), small.replica("b", kv_blocks=10)])
    rejection = router.route(small.ask(prompt_tokens=1590, max_output_tokens=11), fleet.routing_view("m", NOW_S))
    assert rejection.retry_after_s is None
    assert rejection.reason == "1601 prompt and output tokens above 1600, the most a replica of m holds"


def test_a_full_fleet_says_when_room_is_predicted(small, router):
    full = small.load("a", running=16, kv_tokens=3200, kv_blocks_used=200)
    fleet = fleet_of([small.replica("a")], [full])
    ask = small.ask(expected_output_tokens=64)
    rejection = router.route(ask, fleet.routing_view("m", NOW_S))
    span_s = fleet.replica("a").performance.decode_span_s(16, 3200, 64)
    assert rejection.retry_after_s == pytest.approx(span_s / 16, rel=0.01)
    assert "no room for 576 tokens in any of 1 replicas of m" in rejection.reason


def test_who_starts_may_still_come(small, router):
    fleet = fleet_of([small.replica("a", phase=Phase.STARTING)])
    assert router.route(small.ask(), fleet.routing_view("m", NOW_S)).retry_after_s == router.retry_s
    assert router.route(small.ask(), fleet.routing_view("nothing", NOW_S)).retry_after_s == router.retry_s


def test_settings_out_of_range_are_named():
    with pytest.raises(InvalidConfig, match=r"routing\.settings\.stale_s 0.* is outside \(0, inf\)"):
        PredictedLatencyRouter(stale_s=0.0)
