"""How many replicas a flow needs."""

from functools import partial

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.replica import Role
from cluster.slo import Slo
from policies.flow import Flow
from policies.sizing import Bounds, decode_fits, erlang_c, prefill_fits, smallest
from tests.policies.clusters import SLO, group

BOUNDS = Bounds()
PREFILL, DECODE = group(Role.PREFILL), group(Role.DECODE)


def flow(rate_rps: float, prompt: float = 1000.0, output: float = 200.0, **more: float) -> Flow:
    return Flow(
        rate_rps=rate_rps, prompt_tokens=prompt, prompt_tokens_sd=prompt / 2, context_tokens=prompt, output_tokens=output, **more
    )


def prefills(one: Flow, slo: Slo = SLO) -> int:
    return smallest(partial(prefill_fits, PREFILL, one, slo, BOUNDS))


def decodes(one: Flow, slo: Slo = SLO, prefilling: bool = False, of=DECODE) -> int:
    return smallest(partial(decode_fits, of, one, slo, BOUNDS, prefilling=prefilling))


def test_erlang_c_is_the_tabled_probability():
    assert erlang_c(1, 0.5) == pytest.approx(0.5)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.4092, abs=1e-4)


@given(st.integers(1, 400), st.floats(0.0, 0.999))
def test_erlang_c_is_what_the_recursion_by_servers_gives(servers, busy):
    offered, blocked = busy * servers, 1.0
    for server in range(1, servers + 1):
        blocked = offered * blocked / (server + offered * blocked)
    by_recursion = servers * blocked / (servers - offered * (1.0 - blocked))
    assert erlang_c(servers, offered) == pytest.approx(by_recursion, rel=1e-9, abs=1e-290)


def test_nothing_needs_nobody():
    assert prefills(flow(0.0)) == decodes(flow(0.0)) == decodes(flow(0.0), prefilling=True) == 0


def test_offered_load_sets_the_order_of_magnitude():
    work_s = PREFILL.performance.prefill_s(1000)
    rate_rps = 20.0 / work_s
    assert 20 / BOUNDS.utilisation <= prefills(flow(rate_rps)) <= 30


def test_tight_first_token_and_bursts_need_more_replicas():
    rate_rps = 4.0 / PREFILL.performance.prefill_s(1000)
    assert prefills(flow(rate_rps), Slo(ttft_s=0.15)) > prefills(flow(rate_rps), Slo(ttft_s=2.0))
    assert prefills(flow(rate_rps, dispersion=20.0), Slo(ttft_s=0.3)) > prefills(flow(rate_rps), Slo(ttft_s=0.3))


def test_tight_tokens_need_more_replicas_and_say_so():
    assert decodes(flow(40.0), Slo(tpot_s=0.012)) > decodes(flow(40.0), Slo(tpot_s=0.05))
    assert decode_fits(DECODE, flow(200.0), Slo(tpot_s=0.009), BOUNDS, 6, prefilling=False).binding == "TPOT"


def test_long_contexts_are_bound_by_kv():
    small = group(Role.DECODE, kv_tokens=60_000)
    assert decode_fits(small, flow(1.0, prompt=20_000.0), Slo(), BOUNDS, 1, prefilling=False).binding == "KV capacity"


def test_doing_both_needs_no_fewer_than_decoding_alone():
    assert decodes(flow(30.0), prefilling=True) >= decodes(flow(30.0))


def test_measured_slowness_needs_more_replicas():
    slow = group(Role.DECODE, slowdown=2.0)
    assert decodes(flow(60.0), of=slow) > decodes(flow(60.0))


flows = st.builds(flow, st.floats(0.0, 300.0), st.floats(1.0, 8000.0), st.floats(1.0, 2000.0))
slos = st.builds(Slo, ttft_s=st.none() | st.floats(0.05, 5.0), tpot_s=st.none() | st.floats(0.008, 0.2))


@given(flows, slos, st.booleans(), st.integers(0, 300))
def test_one_more_replica_never_stops_fitting(one, slo, prefilling, count):
    for fits in (
        partial(prefill_fits, PREFILL, one, slo, BOUNDS),
        partial(decode_fits, DECODE, one, slo, BOUNDS, prefilling=prefilling),
    ):
        assert fits(count + 1).holds or not fits(count).holds


@given(flows, slos, st.booleans(), st.floats(1.0, 3.0))
def test_more_load_never_needs_fewer(one, slo, prefilling, factor):
    assert prefills(one.times(factor), slo) >= prefills(one, slo)
    assert decodes(one.times(factor), slo, prefilling) >= decodes(one, slo, prefilling)


@given(flows, slos)
def test_smallest_is_the_smallest(one, slo):
    fits = partial(prefill_fits, PREFILL, one, slo, BOUNDS)
    count = smallest(fits)
    assert count == 0 or not fits(count - 1).holds


def test_prompts_that_come_in_between_are_kept_from_stretching_answers():
    beside = Slo(tpot_s=0.03)
    assert decodes(flow(300.0), beside, prefilling=True) > decodes(flow(300.0), beside)
    uneven = msgspec.structs.replace(flow(300.0), dispersion=9.0)
    assert decodes(uneven, beside, prefilling=True) > decodes(flow(300.0), beside, prefilling=True)


def test_flow_whose_answers_are_not_known_yet_is_sized_by_its_prompts():
    unknown = flow(30.0, output=0.0)
    assert decodes(unknown, prefilling=True) >= 1
    assert decodes(unknown) <= 1
