from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.admission import AdmissionQueue, Admitted, Entry, Queued, Refused


def queued(queue: AdmissionQueue, request_id: str, now_s: float = 0.0, **facts: object) -> None:
    assert isinstance(queue.offer(Entry(request_id=request_id, **facts), now_s, room_s=1.0), Queued)


def popped(queue: AdmissionQueue, now_s: float = 1.0) -> list[str]:
    order = []
    while (entry := queue.pop(now_s)) is not None:
        order.append(entry.request_id)
    return order


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["offer", "offer", "offer", "pop", "expire", "cancel"]),
        st.floats(0, 2),
        st.sampled_from(["x", "y", "z"]),
        st.integers(0, 2),
        st.none() | st.floats(0, 5),
        st.booleans(),
    ),
    max_size=80,
)


@given(operations=OPERATIONS, max_waiting=st.integers(0, 6))
def test_every_entry_comes_out_once_in_time_and_the_bound_holds(operations, max_waiting):
    queue, now_s, offered = AdmissionQueue(max_waiting=max_waiting, timeout_s=4.0), 0.0, {}
    ends: Counter[str] = Counter()
    for number, (what, pause_s, tenant, priority, patience_s, room) in enumerate(operations):
        now_s += pause_s
        if what == "offer":
            deadline_s = None if patience_s is None else now_s + patience_s
            entry = Entry(request_id=str(number), tenant=tenant, priority=priority, deadline_s=deadline_s)
            answer = queue.offer(entry, now_s, room_s=None if room else 0.0)
            offered[entry.request_id] = min(now_s + 4.0, now_s + 9.0 if deadline_s is None else deadline_s)
            if isinstance(answer, Admitted | Refused):
                ends[entry.request_id] += 1
            if isinstance(answer, Queued) and answer.displaced:
                ends[answer.displaced] += 1
            if isinstance(answer, Refused):
                assert answer.retry_after_s >= 0
        elif what == "pop" and (entry := queue.pop(now_s)) is not None:
            assert now_s < offered[entry.request_id]
            ends[entry.request_id] += 1
        elif what == "expire":
            for entry in queue.expire(now_s):
                assert now_s >= offered[entry.request_id]
                ends[entry.request_id] += 1
        elif what == "cancel" and offered and queue.cancel(next(iter(offered)), now_s):
            ends[next(iter(offered))] += 1
        assert len(queue) <= max_waiting
    for entry in queue.expire(now_s + 100):
        ends[entry.request_id] += 1
    assert len(queue) == 0
    assert ends == Counter(dict.fromkeys(offered, 1))


def test_higher_priority_goes_first_then_arrival():
    queue = AdmissionQueue()
    for request_id, priority in (("a", 0), ("b", 1), ("c", 0), ("d", 1)):
        queued(queue, request_id, priority=priority)
    assert popped(queue) == ["b", "d", "a", "c"]


def test_tenants_of_one_priority_take_turns():
    queue = AdmissionQueue()
    for number in range(4):
        queued(queue, f"x{number}", tenant="x")
    queued(queue, "y0", tenant="y")
    queued(queue, "z0", tenant="z")
    queued(queue, "y1", tenant="y")
    assert popped(queue) == ["x0", "y0", "z0", "x1", "y1", "x2", "x3"]


@given(flood=st.integers(1, 50))
def test_a_flood_from_one_tenant_does_not_starve_another(flood):
    queue = AdmissionQueue()
    for number in range(flood):
        queued(queue, f"x{number}", tenant="x")
    queued(queue, "y", tenant="y")
    assert popped(queue).index("y") <= 1


@given(flood=st.integers(4, 40))
def test_a_flood_from_one_tenant_does_not_keep_another_out_of_a_full_queue(flood):
    queue = AdmissionQueue(max_waiting=4)
    for number in range(flood):
        queue.offer(Entry(request_id=f"x{number}", tenant="x"), 0.0, room_s=1.0)
    answers = [queue.offer(Entry(request_id=f"y{number}", tenant="y"), 0.0, room_s=1.0) for number in range(3)]
    assert [answer.displaced for answer in answers[:2]] == ["x3", "x2"]
    assert isinstance(answers[2], Refused)
    assert popped(queue) == ["x0", "y0", "x1", "y1"]


def test_no_place_is_taken_of_another_priority():
    queue = AdmissionQueue(max_waiting=2)
    queued(queue, "a", priority=1)
    queued(queue, "b", priority=1)
    assert isinstance(queue.offer(Entry(request_id="c", tenant="y"), 0.0, room_s=1.0), Refused)


def test_nobody_overtakes_who_waits_with_the_same_priority():
    queue = AdmissionQueue()
    assert isinstance(queue.offer(Entry(request_id="a"), 0.0, room_s=None), Admitted)
    queued(queue, "b")
    assert isinstance(queue.offer(Entry(request_id="c"), 0.0, room_s=None), Queued)
    assert isinstance(queue.offer(Entry(request_id="d", priority=1), 0.0, room_s=None), Admitted)


def test_peek_gives_who_pop_will_give():
    queue = AdmissionQueue()
    queued(queue, "a", tenant="x")
    queued(queue, "b", tenant="y")
    assert queue.peek(0.5) == queue.pop(0.5)
    assert queue.peek(0.5).request_id == "b"


def test_a_full_queue_names_its_bound_and_when_it_will_have_drained():
    queue = AdmissionQueue(max_waiting=3)
    for number in range(3):
        queued(queue, str(number))
    for now_s in (1.0, 2.0, 3.0):
        queue.pop(now_s)
        queued(queue, f"after {now_s}", now_s)
    answer = queue.offer(Entry(request_id="late"), 4.0, room_s=1.0)
    assert answer == Refused(reason="3 requests wait, as many as max_queue 3 allows", retry_after_s=pytest.approx(4.0))


def test_before_a_rate_is_known_the_predicted_room_is_the_answer():
    queue = AdmissionQueue(max_waiting=2, timeout_s=7.0)
    queued(queue, "a")
    queued(queue, "b")
    assert queue.offer(Entry(request_id="c"), 0.0, room_s=0.5).retry_after_s == 1.5
    assert queue.offer(Entry(request_id="d"), 0.0, room_s=60.0).retry_after_s == 67.0


@given(every_s=st.floats(0.01, 0.5), served=st.integers(3, 200), idle_s=st.floats(0, 1e6), waiting=st.integers(1, 20))
def test_the_answer_is_the_time_that_draining_at_the_rate_of_late_takes_however_long_nobody_waited(
    every_s, served, idle_s, waiting
):
    queue, now_s = AdmissionQueue(max_waiting=waiting + 1, timeout_s=1000.0), 0.0
    queued(queue, "first", now_s)
    for number in range(served):
        now_s += every_s
        if number + 1 < served:
            queued(queue, f"served {number}", now_s)
        queue.pop(now_s)
    assert len(queue) == 0
    now_s += idle_s
    for number in range(waiting + 1):
        queued(queue, f"waiting {number}", now_s)
    refused = queue.offer(Entry(request_id="late"), now_s, room_s=1.0)
    assert refused.retry_after_s == pytest.approx((waiting + 2) * every_s, rel=0.5)
