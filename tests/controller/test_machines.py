"""Which nodes are counted on."""

from controller.observe.machines import DAMP_S, FORGET_S, Machines

A, B = "a", "b"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def machines() -> tuple[Machines, Clock]:
    clock = Clock()
    made = Machines(clock)
    made.told(frozenset({A, B}))
    return made, clock


def test_a_node_that_ray_lists_is_up_and_one_that_it_does_not_is_down():
    known, _ = machines()
    assert known.alive() == {A, B}
    known.told(frozenset({A}))
    assert known.alive() == {A}


def test_a_node_of_which_a_worker_fell_silent_takes_nothing_new_until_it_answers():
    known, _ = machines()
    known.suspect(A)
    assert (known.alive(), known.suspects) == ({B}, {A})
    known.answered(A)
    assert (known.alive(), known.suspects) == ({A, B}, frozenset())


def test_a_node_that_was_lost_is_trusted_later_each_time_it_comes_back():
    known, clock = machines()
    for losses in (1, 2, 3):
        known.suspect(A)
        known.unanswered(A)
        known.unanswered(A)
        known.answered(A)
        wait_s = DAMP_S * 2 ** (losses - 1)
        clock.now_s += wait_s - 0.1
        assert known.alive() == {B}, losses
        clock.now_s += 0.2
        assert known.alive() == {A, B}, losses


def test_a_node_that_ray_lost_and_found_is_damped_too():
    known, clock = machines()
    known.told(frozenset({B}))
    known.told(frozenset({A, B}))
    assert known.alive() == {B}
    clock.now_s += DAMP_S
    assert known.alive() == {A, B}


def test_losses_of_long_ago_are_forgotten():
    known, clock = machines()
    known.told(frozenset({B}))
    clock.now_s += FORGET_S + 1.0
    known.told(frozenset({A, B}))
    assert known.alive() == {A, B}
