"""What `make demo` promises of its decisions, whatever machine it runs on."""

import pytest

from controller.explanation import replay
from controller.journal import Journal
from demo.__main__ import flip as printed
from tests.controller.demo_day import play
from tests.controller.turning_points import proven


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    return play(tmp_path_factory.mktemp("demo") / "journal.sqlite")


def test_decode_grows_a_role_changes_a_loss_is_made_up_for_and_the_fleet_shrinks(day: Journal):
    actions = [action for choice in day.changes(most=1000) for action in choice.decision.actions]
    kinds = [type(action).__name__ for action in actions]
    grown = [action.words for action in actions[: kinds.index("ChangeRole")] if "start decode" in action.words]
    assert len(grown) > 1, "the first replica, and one more for the burst"
    assert actions[kinds.index("ChangeRole")].words.endswith("becomes prefill")
    assert kinds[-1] == "DrainReplica"
    assert any("lost: " in action.reason.text for action in actions)


def test_every_decision_of_the_demo_would_have_been_turned_by_what_its_report_prints(day: Journal):
    stated = 0
    for told in proven(day):
        nearest = told.flips[0]
        assert float(printed(told).removeprefix(nearest.lever).split()[0]) == nearest.turns_at
        stated += len(told.flips)
    assert stated > 20


def test_its_journal_is_decided_again_alike(day: Journal):
    assert [number for number, difference in replay(day) if difference] == []
