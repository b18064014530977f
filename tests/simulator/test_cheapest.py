"""The fleet that is found is the cheapest, as trying all of them shows; and few are simulated for it."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidConfig
from cluster.placement import group_of
from simulator.case import Case, run
from simulator.cheapest import Search
from simulator.outcome import Outcome
from simulator.space import Space, SpaceFile
from tests.simulator.comparing import BRISK, SHORT, case, fleet, outcome

pytestmark = pytest.mark.timeout(900)  # Who simulates first waits for the compiler, which takes a minute and more.

LONG = "poisson:rate=0.5,minutes=10,prompt=fixed(50),output=fixed(5)"
WIDE = SpaceFile(replicas={"m/decode/h100": (0, 5), "m/decode/l4": (0, 9)}, nodes={"h100": 3, "l4": 9})


class Made:
    """Instead of a simulation: serves what is told to, and counts."""

    def __init__(self, serves) -> None:
        self.serves, self.asked = serves, []

    def __call__(self, case: Case, words: str) -> Outcome:
        counts = {group_of(case.fleet, spec): spec.count for spec in case.fleet.replicas}
        replicas = (counts.get("m/decode/h100", 0), counts.get("m/decode/l4", 0))
        self.asked.append((replicas, words))
        if self.serves(*replicas):
            return outcome()
        return outcome(attainment=0.5, kept=50, outside=10**6, missed={"TTFT": 50}, stopped=case.may_miss is not None)


@settings(max_examples=40)
@given(st.floats(0.1, 5), st.floats(0.1, 2), st.floats(0.1, 12), st.sampled_from([SHORT, LONG]))
def test_answer_is_the_cheapest_wherever_more_never_harms(h100: float, l4: float, need: float, trace: str):
    space = Space(fleet(), WIDE)
    made = Made(lambda a, b: a * h100 + b * l4 >= need)
    serving = [usd for (a, b), usd in zip(space.counts.tolist(), space.usd_per_hour, strict=True) if made.serves(a, b)]
    search = Search(case(trace), space, 0.99, made)
    if not serving:
        with pytest.raises(InvalidConfig, match="none of the 59 fleets"):
            search.answer()
        return
    answer = search.answer()
    assert answer.best.usd_per_hour == min(serving)
    assert made.serves(*answer.best.replicas.values())
    assert answer.excluded + answer.dominated + answer.dearer <= answer.fleets == 59
    assert len({replicas for replicas, _ in made.asked}) <= 25
    assert answer.surprises == []


def test_slice_refuses_what_misses_more_there_than_the_whole_may_miss():
    made = Made(lambda h100, l4: h100 + l4 >= 4)
    answer = Search(case(LONG), Space(fleet(), WIDE), 0.99, made).answer()
    assert answer.refused > 0
    assert {one.kind for one in answer.cheaper} <= {"slice", "whole"}
    assert any(words.endswith("slice") for _, words in made.asked)


def test_neighbour_that_serves_against_expectation_takes_the_answers_place():
    made = Made(lambda h100, l4: l4 >= 5)
    answer = Search(case(), Space(fleet(), WIDE), 0.99, lambda one, words: _late(made, one, words)).answer()
    assert answer.best.replicas == {"m/decode/h100": 0, "m/decode/l4": 5}
    assert any("was taken for one that fails" in said for said in answer.surprises)


def test_replica_more_that_harms_is_told():
    made = Made(lambda h100, l4: l4 >= 3 and h100 == 0)
    answer = Search(case(), Space(fleet(), WIDE), 0.99, made).answer()
    assert answer.best.replicas == {"m/decode/h100": 0, "m/decode/l4": 3}
    assert answer.surprises == [
        "1 x decode/h100, 3 x decode/l4 keeps the SLO for 50.00%, not 100.00%, though it has a replica more"
    ]


def _late(made: Made, one: Case, words: str) -> Outcome:
    """Five are told to fail where a run may be stopped, and serve where it may not."""
    found = made(one, words)
    if one.may_miss is not None and "5 x decode/l4" in words:
        return outcome(attainment=0.5, outside=10**6, stopped=True)
    return found


def test_space_in_which_nothing_serves_says_how_near_the_best_came_and_what_binds():
    made = Made(lambda h100, l4: False)
    with pytest.raises(InvalidConfig, match=r"none of the 11 fleets .* 0\.99 .* keeps it for 0\.5, and is bound by TTFT"):
        Search(case(), Space(fleet()), 0.99, made).answer()


def test_warm_up_beyond_the_traffic_is_refused():
    with pytest.raises(InvalidConfig, match="warm-up 900 s: no request arrives after it"):
        Search(msgspec.structs.replace(case(), warm_up_s=900.0), Space(fleet()), 0.99, Made(lambda *_: True))


def test_answer_is_that_of_simulating_every_fleet():
    one, space, goal = case(BRISK), Space(fleet()), 0.95
    answer = Search(one, space, goal, lambda case, words: run(case)).answer()
    whole = [
        run(msgspec.structs.replace(one, fleet=space.build(number), control=False)).attainment
        for number in range(len(space.counts))
    ]
    serving = [number for number, attainment in enumerate(whole) if attainment >= goal]
    assert 0 < len(serving) < len(whole), whole
    assert answer.best.usd_per_hour == min(space.usd_per_hour[serving])
    assert answer.whole < len(whole)
    number = space.find(np.array(list(answer.best.replicas.values())))
    assert answer.best.outcome.attainment == whole[number]
