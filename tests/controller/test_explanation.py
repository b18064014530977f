"""Why, from a journal; and a journal decided again."""

from pathlib import Path

import msgspec
import pytest

from cluster.errors import InvalidConfig, InvalidRequest
from cluster.fleet import PipelineSpec, PolicySpec
from cluster.replica import Role
from controller.explanation import explain, replay
from controller.journal import Entry, Journal, Outcome
from controller.pipelines import as_text, build, from_text
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
    journal.add(Outcome(number=3, action=0, at_s=NOW_S + 9, outcome="done"))
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


def test_what_is_not_there_is_refused_by_name(tmp_path: Path):
    journal = journal_of(tmp_path / "j", [2.0])
    with pytest.raises(InvalidRequest, match="pass 9 is not in the journal"):
        explain(journal, 9)
    with pytest.raises(InvalidRequest, match="nobody is no replica, role or group of pass 1; groups are m/prefill/p, m/decode/p"):
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
        (PolicySpec(use="policies.nowhere:X"), r"control.policies\[0\].use 'policies.nowhere:X' cannot be imported"),
        (PolicySpec(use="policies.scaling:Nope"), "cannot be imported as module:Class"),
        (PolicySpec(use="policies.guards:Capacity"), "no msgspec.Struct with a method `decide`"),
        (PolicySpec(use="policies.scaling:Scaling", settings={"setle_s": 1.0}), "settings: .*setle_s"),
        (PolicySpec(use="policies.scaling:Scaling", settings={"window": {"sigmas": "two"}}), r"settings: Expected `float`"),
    ],
)
def test_impossible_policy_is_refused_with_its_place(spec: PolicySpec, said: str):
    with pytest.raises(InvalidConfig, match=said):
        build(PipelineSpec(policies=(spec,)))
