"""Conversations: each turn says again what was said, shares its blocks, and comes after the turn before."""

import itertools
import statistics
from collections import defaultdict

import pytest

from workloads.generators import parse_generator

TURNS = "turns=geometric(4),think=exponential(20),prompt=lognormal(80,0.6),output=uniform(20,60)"
SESSIONS = f"sessions:rate=1,minutes=60,{TURNS},system=100,prefixes=2"


def made(text, seed=0):
    return list(parse_generator(text).rows(seed))


def by_session(rows):
    turns = defaultdict(list)
    for row in rows:
        turns[row.session_id].append(row)
    return list(turns.values())


def test_turns_of_all_conversations_come_in_order_of_arrival_and_the_same_for_the_same_seed():
    rows = made(SESSIONS)
    assert [row.arrival_s for row in rows] == sorted(row.arrival_s for row in rows)
    assert rows[-1].arrival_s < 3600
    assert made(SESSIONS) == rows != made(SESSIONS, seed=1)


def test_a_prompt_is_all_that_was_said_and_a_new_message():
    for turns in by_session(made(SESSIONS)):
        assert turns[0].prompt_tokens > 100
        assert all(late.prompt_tokens > early.prompt_tokens + early.output_tokens for early, late in itertools.pairwise(turns))


def test_a_turn_opens_with_the_blocks_of_the_turn_before_and_no_others_are_shared_between_conversations():
    conversations = by_session(made(SESSIONS))
    for turns in conversations:
        assert all(len(turn.block_hashes) == turn.prompt_tokens // 16 for turn in turns)
        for early, late in itertools.pairwise(turns):
            assert late.block_hashes[: len(early.block_hashes)] == early.block_hashes
    last = [turns[-1].block_hashes for turns in conversations]
    assert len({hashes[:6] for hashes in last}) == 2
    own = [block for hashes in last for block in hashes[6:]]
    assert len(set(own)) == len(own)


def test_conversations_have_the_stated_rate_turns_and_pauses():
    conversations = by_session(made(SESSIONS))
    assert len(conversations) == pytest.approx(3600, rel=0.1)
    whole = [turns for turns in conversations if turns[0].arrival_s < 2400]
    assert statistics.mean(len(turns) for turns in whole) == pytest.approx(4, rel=0.1)
    pauses_s = [late.arrival_s - early.arrival_s for turns in whole for early, late in itertools.pairwise(turns)]
    assert statistics.mean(pauses_s) == pytest.approx(20, rel=0.1)


def test_a_conversation_has_one_tenant_class_and_priority():
    conversations = by_session(made(f"{SESSIONS},tenants=a:3/b:1,classes=x:1/y:1,priorities=0:1/1:1"))
    assert all(len({(turn.tenant, turn.slo_class, turn.priority) for turn in turns}) == 1 for turns in conversations)
    assert sum(turns[0].tenant == "a" for turns in conversations) / len(conversations) == pytest.approx(0.75, abs=0.05)


def test_a_conversation_ends_before_it_exceeds_the_context():
    free, bounded = (by_session(made(SESSIONS + more)) for more in ("", ",context=400"))
    assert max(turn.prompt_tokens + turn.output_tokens for turns in bounded for turn in turns) <= 400
    assert [turns[0].session_id for turns in bounded] == [turns[0].session_id for turns in free]
    for kept, turns in zip(bounded, free, strict=True):
        fitting = list(itertools.takewhile(lambda turn: turn.prompt_tokens + turn.output_tokens <= 400, turns))
        assert kept == fitting or len(kept) == 1


def test_a_think_time_leaves_what_is_said_as_it_was():
    slow = by_session(made(SESSIONS.replace("exponential(20)", "lognormal(60,0.8)")))
    for one, other in zip(by_session(made(SESSIONS)), slow, strict=True):
        assert all(early.block_hashes == late.block_hashes for early, late in zip(one, other, strict=False))
