"""Why, from a journal; and a journal decided again."""

from pathlib import Path

import msgspec
import pytest

from cluster.errors import InvalidConfig, InvalidRequest
from cluster.fleet import PipelineSpec, PolicySpec
from cluster.replica import Role
from cluster.snapshot import Hold
from controller import explanation
from controller.explanation import explain, replay
from controller.journal import Entry, Journal, Outcome
from controller.pipelines import as_text, build, from_text
from tests.controller.scripted import LOST_AT, LOST_NODE
from tests.controller.turning_points import proven
from tests.policies.clusters import NOW_S, cluster, group, steady

SPEC = PipelineSpec()
PIPELINE = build(SPEC)


def journal_of(path: Path, rates: list[float]) -> Journal:
    journal = Journal(path)
    for number, rate_rps in enumerate(rates, start=1):
        groups = [group(Role.PREFILL, 1, min_replicas=1), group(Role.DECODE, 1)]
        snapshot = cluster(groups, [steady(rate_rps)], pass_number=number, now_s=NOW_S + number)
        entry = Entry(epoch=3, pipeline=as_text(SPEC), mode="act", snapshot=snapshot, decision=PIPELINE.decide(snapshot))
        journal.write(entry)
    return journal


def test_change_is_explained_with_numbers_and_turning_points(tmp_path: Path):
    journal = journal_of(tmp_path / "j", [2.0, 2.0, 40.0])
    journal.add([Outcome(number=3, action=0, at_s=NOW_S + 9, outcome="done")])
    answer = explain(journal, journal.last_change())
    prefill = next(one for one in answer.groups if one.group == "m/prefill/p")
    assert (prefill.before, prefill.after) == (1, 2)
    assert prefill.why.startswith("1 do not carry 40.00 requests/s")
    assert prefill.numbers["needed"] == 2
    assert any(one.action.startswith("start prefill-p-") for one in prefill.actions)
    assert any(flip.lever == "demand of m" and flip.outcome != prefill.outcome for flip in prefill.flips)
    assert [one.became for group in answer.groups for one in group.actions].count("done") == 1


@pytest.mark.parametrize("only", ["m/decode/p", "decode", "decode-p-0", "decode-p-1000"])
def test_one_can_ask_for_a_group_a_role_or_a_replica(tmp_path: Path, only: str):
    journal = journal_of(tmp_path / "j", [60.0])
    if only == "decode-p-1000":
        only = next(one.replica_id for one in journal.entry(1).decision.actions if one.group == "m/decode/p")
    assert [one.group for one in explain(journal, 1, only).groups] == ["m/decode/p"]


def test_one_can_ask_for_a_node(tmp_path: Path):
    journal = journal_of(tmp_path / "j", [2.0, 60.0, 60.0])
    start = next(one for one in journal.entry(2).decision.actions if one.group == "m/decode/p")
    assert journal.last_touch(start.node, NOW_S + 2) == 2
    told = {one.group: one for one in explain(journal, 2, start.node).groups}
    assert start.words in [step.action for step in told["m/decode/p"].actions]
    assert all(step.action.endswith(f"on {start.node}") for one in told.values() for step in one.actions)


def test_what_is_advised_again_each_second_names_no_node(tmp_path: Path):
    journal = journal_of(tmp_path / "j", [60.0])
    entry = journal.entry(1)
    start = entry.decision.actions[0]
    snapshot = msgspec.structs.replace(entry.snapshot, pass_number=2, now_s=entry.snapshot.now_s + 1.0)
    journal.write(msgspec.structs.replace(entry, mode="advise", snapshot=snapshot))
    assert (journal.last_touch(start.node), journal.last_touch(start.group)) == (1, 2)


def test_what_is_not_there_is_refused_by_name(tmp_path: Path):
    journal = journal_of(tmp_path / "j", [2.0])
    with pytest.raises(InvalidRequest, match="pass 9 is not in the journal"):
        explain(journal, 9)
    with pytest.raises(InvalidRequest, match="nobody is no replica, role, group or node of pass 1; groups are m/prefill/p"):
        explain(journal, 1, "nobody")


def test_journal_is_decided_again_alike_and_a_changed_one_is_told(tmp_path: Path):
    journal = journal_of(tmp_path / "j", [2.0, 40.0, 5.0])
    assert [difference for _, difference in replay(journal)] == [None] * 3
    entry = journal.entry(2)
    forged = msgspec.structs.replace(entry.decision, targets={"m/decode/p": 7})
    snapshot = msgspec.structs.replace(entry.snapshot, pass_number=4)
    journal.write(Entry(epoch=3, pipeline=entry.pipeline, mode="act", snapshot=snapshot, decision=forged))
    assert [number for number, difference in replay(journal) if difference] == [4]


def test_effective_pipeline_survives_as_text():
    assert from_text(as_text(SPEC)) == PIPELINE
    slower = PipelineSpec(policies=(PolicySpec(use="policies.scaling:Scaling", settings={"settle_s": 90.0}),))
    assert from_text(as_text(slower)).policies[0].settle_s == 90.0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (PolicySpec(use="policies.nowhere:X"), r"control.pipeline.policies\[0\].use 'policies.nowhere:X' cannot be imported"),
        (PolicySpec(use="policies.scaling:Nope"), "cannot be imported as module:Class"),
        (PolicySpec(use="policies.guards:Capacity"), "no msgspec.Struct with a method `decide`"),
        (PolicySpec(use="policies.scaling:Scaling", settings={"setle_s": 1.0}), r"policies\[0\].settings.setle_s"),
        (
            PolicySpec(use="policies.scaling:Scaling", settings={"window": {"sigmas": "two"}}),
            r"settings.window.sigmas: Expected `float`",
        ),
    ],
)
def test_impossible_policy_is_refused_with_its_place(spec: PolicySpec, said: str):
    with pytest.raises(InvalidConfig, match=said):
        build(PipelineSpec(policies=(spec,)))


@pytest.fixture(scope="module")
def scripted(played: Path) -> Journal:
    return Journal(played, read_only=True)


def test_script_has_a_burst_a_role_change_a_lost_node_and_a_lull(scripted: Journal):
    decisions = [choice.decision for choice in scripted.changes(most=1000)]
    actions = [action for decision in decisions for action in decision.actions]
    assert {type(action).__name__ for action in actions} == {"StartReplica", "DrainReplica", "ChangeRole"}
    assert any(one.missing for one in explain(scripted, LOST_AT).groups)


def test_every_stated_turning_point_of_a_scripted_day_is_true(scripted: Journal):
    assert sum(len(told.flips) for told in proven(scripted)) > 50


def test_turning_points_are_stated_in_digits_that_can_be_read(scripted: Journal):
    flips = [flip for told in explain(scripted, 12).groups for flip in told.flips]
    assert max(len(f"{flip.turns_at:.15g}") for flip in flips) <= 7


def test_replaced_replica_is_told_with_its_dead_node(scripted: Journal):
    (prefill,) = explain(scripted, LOST_AT).groups
    assert prefill.before == prefill.after == prefill.present + 1
    assert prefill.missing == (f"prefill-p-1 on {LOST_NODE}, which does not answer",)
    assert [step.became for step in prefill.actions] == ["done"]


def test_of_a_replica_only_its_own_action_is_told(scripted: Journal):
    number = scripted.last_touch("decode-p-3", scripted.entry(20).snapshot.now_s)
    (decode,) = explain(scripted, number, "decode-p-3").groups
    assert [step.action for step in decode.actions] == ["start decode-p-3 on n3"]


def journal_with(path: Path, spec: PipelineSpec = SPEC, mode: str = "act", **more: object) -> Journal:
    """One pass, number 1, of a decode and a prefill group."""
    groups = [group(Role.PREFILL, 1, min_replicas=1), group(Role.DECODE, 3)]
    fields = {"pass_number": 1, **more}
    snapshot = cluster(groups, [fields.pop("workload", steady(30.0))], **fields)
    journal = Journal(path)
    decision = build(spec).decide(snapshot)
    journal.write(Entry(epoch=3, pipeline=as_text(spec), mode=mode, snapshot=snapshot, decision=decision))
    return journal


def test_what_was_dropped_is_told_beside_what_was_decided_instead(tmp_path: Path):
    """Prefill could be given up, which the rate of change forbids: then each group is scaled for itself."""
    journal = Journal(tmp_path / "j")
    groups = [group(Role.PREFILL, 2), group(Role.DECODE, 6)]
    snapshot = cluster(groups, [steady(56.0)], pass_number=1)
    journal.write(Entry(epoch=3, pipeline=as_text(SPEC), mode="act", snapshot=snapshot, decision=PIPELINE.decide(snapshot)))
    answer = explain(journal, 1)
    assert [one.group for one in answer.groups] == ["m/decode/p", "m/prefill/p"]
    prefill = answer.groups[1]
    assert prefill.why.startswith("2 do not carry")
    assert "RateOfChange" in [one.by for one in prefill.dropped]
    assert any(one.reason.startswith("together") for one in prefill.dropped)
    assert prefill.flips


def test_pinned_group_hangs_on_no_number(tmp_path: Path):
    pin = Hold(kind="pin", target="m/decode/p", replicas=5, author="ann", expires_s=NOW_S + 60)
    answer = explain(journal_with(tmp_path / "j", holds=(pin,)), 1, "decode")
    (decode,) = answer.groups
    assert (decode.after, decode.why, decode.flips, decode.unturned) == (5, "pinned by ann", (), ())
    assert any(one.proposal.startswith("m/decode/p to") for one in decode.dropped)


def test_paused_fleet_says_what_it_would_have_done(tmp_path: Path):
    pause = Hold(kind="pause", author="ann", expires_s=NOW_S + 60)
    answer = explain(journal_with(tmp_path / "j", holds=(pause,)), 1, "prefill")
    (prefill,) = answer.groups
    assert prefill.before == prefill.after
    assert ("Paused", "paused by ann") in [(one.by, one.why) for one in prefill.dropped]
    assert prefill.flips == ()
    assert "demand of m" in prefill.unturned


def test_drained_node_is_each_replicas_own_reason(tmp_path: Path):
    hold = Hold(kind="drain", target="n1", author="ann", expires_s=NOW_S + 60)
    journal = journal_with(tmp_path / "j", holds=(hold,))
    steps = [step for one in explain(journal, 1).groups for step in one.actions]
    assert "node n1 is drained by ann" in [step.why for step in steps]


def test_advised_action_is_not_said_to_be_under_way(tmp_path: Path):
    answer = explain(journal_with(tmp_path / "j", mode="advise", workload=steady(120.0)), 1)
    assert {step.became for one in answer.groups for step in one.actions} == {"only advised"}


class Broken(msgspec.Struct, frozen=True):
    """A policy that raises."""

    emergency: bool = False

    def decide(self, snapshot, accepted):
        raise ZeroDivisionError("by design")


def test_failed_pass_says_what_raised_and_turns_on_nothing(tmp_path: Path):
    spec = PipelineSpec(policies=(PolicySpec(use=f"{__name__}:Broken"),))
    answer = explain(journal_with(tmp_path / "j", spec), 1)
    assert answer.failed == "Broken: ZeroDivisionError('by design')"
    assert all(one.why == f"the pass did nothing: {answer.failed}" and not one.flips for one in answer.groups)


def test_slip_of_the_pen_is_answered_with_near_names(tmp_path: Path):
    with pytest.raises(InvalidRequest, match="near it are decode"):
        explain(journal_with(tmp_path / "j"), 1, "decoed")


def test_turning_points_of_many_groups_are_looked_for_by_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(explanation, "MOST_TURNED", 1)
    groups = [group(Role.MIXED, 1, model=f"m{index}") for index in range(3)]
    snapshot = cluster(groups, [steady(9.0, model=one.model) for one in groups], pass_number=1)
    journal = Journal(tmp_path / "j")
    journal.write(Entry(epoch=3, pipeline=as_text(SPEC), mode="act", snapshot=snapshot, decision=PIPELINE.decide(snapshot)))
    assert [one.sought for one in explain(journal, 1).groups] == [True, False, False]
    assert all(one.sought and one.flips for one in explain(journal, 1, "mixed").groups)


def test_one_is_told_how_far_it_is(tmp_path: Path):
    told: list[tuple[int, int]] = []
    answer = explain(journal_with(tmp_path / "j"), 1, "decode", told=lambda done, of: told.append((done, of)))
    levers = len(answer.groups[0].flips) + len(answer.groups[0].unturned)
    assert told == [(done, levers) for done in range(levers)]
