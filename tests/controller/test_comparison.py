"""Challengers beside the policy that acts."""

import msgspec
import pytest

from cluster.actions import ChangeRole, Decision, Reason, ScaleRole
from cluster.fleet import PipelineSpec, PolicySpec
from cluster.node import Node
from cluster.replica import Role
from cluster.snapshot import ClusterSnapshot
from controller.comparison import AWAY_S, Pass, compare, prices_of, recorded, redecided
from controller.journal import Journal
from controller.pipelines import build
from tests.controller.scripted import play
from tests.policies.clusters import NOW_S, cluster, group

STUBBORN = build(PipelineSpec(policies=(PolicySpec(use="policies.scaling:Scaling", settings={"settle_s": 1e6}),)))
INFINITELY_EARLY = float("-inf")


def decision(replicas: int, why: str = "because") -> Decision:
    return Decision(targets={"g": replicas}, wishes=(ScaleRole(group="g", replicas=replicas, reason=Reason(text=why)),))


def passes(acting: list[int], other: list[int], every_s: float = 10.0, price: float = 2.0) -> list[Pass]:
    return [
        Pass(
            number=number,
            at_s=NOW_S + number * every_s,
            acting=decision(one, f"acting {number}"),
            challengers={"c": decision(two, f"challenging {number}")},
            prices={"g": price},
        )
        for number, (one, two) in enumerate(zip(acting, other, strict=True))
    ]


def test_targets_count_from_their_pass_until_the_next():
    (one,) = compare(passes([1, 3, 3, 100], [2, 2, 2, 2], every_s=36.0)).groups
    assert (one.acting.replica_hours, one.proposed.replica_hours) == pytest.approx((0.07, 0.06))
    assert (one.acting.usd, one.proposed.usd) == pytest.approx((0.14, 0.12))
    assert (one.acting.mean_replicas, one.proposed.mean_replicas) == pytest.approx((7 / 3, 2.0))
    assert (one.acting.changes, one.proposed.changes) == (2, 0)


def test_first_divergence_has_both_reasons():
    (one,) = compare(passes([1, 1, 2, 2], [1, 1, 1, 2])).groups
    assert (one.passes, one.differing) == (4, 1)
    assert (one.first.number, one.first.acting, one.first.challenger) == (2, "2 replicas", "1 replica")
    assert (one.first.acting_why, one.first.challenger_why) == ("acting 2", "challenging 2")


def test_equal_targets_with_another_role_change_differ():
    change = ChangeRole(replica_id="r", role=Role.DECODE, source="h", target="g", reason=Reason(text="swap"))
    (one,) = passes([1], [1])
    other = Decision(targets={"g": 1}, wishes=(change,), actions=(change,))
    (found,) = compare([msgspec.structs.replace(one, challengers={"c": other})]).groups
    assert (found.differing, found.first.challenger_why) == (1, "swap")


def test_time_in_which_the_controller_was_away_is_nobodys():
    before, after = passes([5, 5], [1, 1], every_s=AWAY_S + 1)
    (one,) = compare([before, after]).groups
    assert (one.acting.replica_hours, one.acting.mean_replicas) == (0.0, 5.0)


def test_nothing_read_is_nothing_compared():
    found = compare([])
    assert (found.passes, found.groups) == (0, ())


def test_price_of_a_replica_is_its_share_of_a_living_node():
    nodes = (
        Node(name="a", pool="p", slots=4, price_usd_per_hour=8.0),
        Node(name="b", pool="p", slots=2, price_usd_per_hour=1.0),
        Node(name="c", pool="p", slots=2, price_usd_per_hour=100.0, alive=False),
    )
    snapshot: ClusterSnapshot = cluster([group()], nodes=nodes)
    assert prices_of(snapshot) == {"m/mixed/p": 1.5}


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    play(path := tmp_path_factory.mktemp("comparison") / "j", {"stubborn": STUBBORN}).close()
    return Journal(path, read_only=True)


def test_shadows_are_compared_as_they_were_journaled(journal: Journal):
    found = compare(recorded(journal, INFINITELY_EARLY))
    assert {one.challenger for one in found.groups} == {"stubborn"}
    assert found.passes == journal.count()
    differing = {one.group: one.differing for one in found.groups}
    assert all(0 < count < found.passes for count in differing.values())
    assert all(one.acting.usd == pytest.approx(one.acting.replica_hours) for one in found.groups)


def test_pipeline_that_decides_afterwards_is_compared_like_one_in_shadow(journal: Journal):
    shadow = compare(recorded(journal, INFINITELY_EARLY))
    later = compare(redecided(journal, INFINITELY_EARLY, "stubborn", STUBBORN))
    assert [(one.group, one.differing, one.first, one.proposed.changes) for one in later.groups] == [
        (one.group, one.differing, one.first, one.proposed.changes) for one in shadow.groups
    ]


def test_only_what_is_since_then_counts(journal: Journal):
    at_s = journal.span[1] - 52.0
    assert compare(recorded(journal, at_s)).since_s >= at_s
    assert compare(recorded(journal, at_s)).passes == compare(redecided(journal, at_s, "x", STUBBORN)).passes == 11


def test_same_pipeline_never_differs(journal: Journal):
    found = compare(redecided(journal, INFINITELY_EARLY, "same", build(PipelineSpec())))
    assert [one.differing for one in found.groups] == [0, 0]
    assert [one.first for one in found.groups] == [None, None]
