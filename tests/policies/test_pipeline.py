"""From proposals to a decision."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from cluster.actions import ChangeRole, DrainReplica, Dropped, Reason, ScaleRole, StartReplica
from cluster.replica import Role
from policies.guards import Capacity, RateOfChange
from policies.pipeline import Pipeline
from policies.policy import Verdict
from tests.policies.clusters import cluster, group

WHY = Reason(text="because")
PREFILL, DECODE = group(Role.PREFILL, 2), group(Role.DECODE, 2)
SNAPSHOT = cluster([PREFILL, DECODE])


class Says(msgspec.Struct, frozen=True):
    """A policy that proposes what it is told."""

    actions: tuple
    emergency: bool = False

    def decide(self, snapshot, accepted):
        return self.actions


class Raises(msgspec.Struct, frozen=True):
    emergency: bool = False

    def decide(self, snapshot, accepted):
        raise ZeroDivisionError("division by zero")


class Stops(msgspec.Struct, frozen=True):
    """A guard that stops one group's target."""

    group: str

    def limit(self, snapshot, actions):
        stopped = [action for action in actions if isinstance(action, ScaleRole) and action.group == self.group]
        rest = tuple(action for action in actions if action not in stopped)
        return Verdict(actions=rest, dropped=tuple(Dropped(action=action, by="Stops", why="no") for action in stopped))


class StopsBundles(msgspec.Struct, frozen=True):
    def limit(self, snapshot, actions):
        first = next((action for action in actions if action.bundle), None)
        rest = tuple(action for action in actions if action is not first)
        return Verdict(actions=rest, dropped=() if first is None else (Dropped(action=first, by="StopsBundles", why="no"),))


class StopsChanges(msgspec.Struct, frozen=True):
    def limit(self, snapshot, actions):
        stopped = [action for action in actions if isinstance(action, ChangeRole)]
        rest = tuple(action for action in actions if action not in stopped)
        return Verdict(actions=rest, dropped=tuple(Dropped(action=one, by="StopsChanges", why="no") for one in stopped))


def scale(to: int, of=DECODE, bundle: str = "") -> ScaleRole:
    return ScaleRole(group=of.name, replicas=to, reason=WHY, bundle=bundle)


def change() -> ChangeRole:
    return ChangeRole(replica_id="prefill-p-0", role=Role.DECODE, source=PREFILL.name, target=DECODE.name, reason=WHY)


def decide(*policies, guards=()):
    return Pipeline(policies=policies, guards=tuple(guards)).decide(SNAPSHOT)


def test_earlier_policy_wins_and_the_loser_is_recorded():
    decision = decide(Says((scale(3),)), Says((scale(5),)))
    assert decision.targets[DECODE.name] == 3
    (lost,) = decision.dropped
    assert (lost.action, lost.by) == (scale(5), "Says")
    assert lost.why == f"{DECODE.name} is claimed before Says"


def test_emergency_goes_first_wherever_it_stands():
    assert decide(Says((scale(3),)), Says((scale(5),), emergency=True)).targets[DECODE.name] == 5


def test_role_change_claims_both_groups():
    decision = decide(Says((change(),)), Says((scale(9), scale(9, PREFILL))))
    assert decision.targets == {PREFILL.name: 1, DECODE.name: 3}
    assert decision.actions == (change(),)
    assert len(decision.dropped) == 2


def test_bundle_is_refused_whole():
    decision = decide(Says((scale(3),)), Says((scale(1, bundle="b"), scale(1, PREFILL, bundle="b"))))
    assert decision.targets == {PREFILL.name: 2, DECODE.name: 3}
    assert {one.action.group for one in decision.dropped} == {DECODE.name, PREFILL.name}


def test_bundle_goes_when_a_guard_stops_a_part_of_it():
    bundle = Says((scale(3, bundle="b"), scale(1, PREFILL, bundle="b")))
    decision = decide(bundle, guards=[Stops(DECODE.name)])
    assert decision.actions == ()
    assert [one.why for one in decision.dropped] == ["no", "bundle b has lost another action"]


def test_claims_of_what_a_guard_stops_are_given_back():
    arranged = Says((scale(9, bundle="b"), scale(0, PREFILL, bundle="b")))
    decision = decide(arranged, Says((scale(3), scale(4, PREFILL))), guards=[StopsBundles()])
    assert decision.targets == {PREFILL.name: 4, DECODE.name: 3}
    assert [one.why for one in decision.dropped] == ["no", "bundle b has lost another action"]


def test_role_change_that_a_guard_stops_leaves_scaling_to_scale():
    decision = decide(Says((change(),)), Says((scale(3), scale(2, PREFILL))), guards=[StopsChanges()])
    assert decision.targets == {PREFILL.name: 2, DECODE.name: 3}
    assert [type(one.action) for one in decision.dropped] == [ChangeRole]


def test_policy_that_raises_makes_the_pass_do_nothing():
    decision = decide(Says((scale(5),)), Raises())
    assert decision.actions == ()
    assert decision.targets == {PREFILL.name: 2, DECODE.name: 2}
    assert decision.failed == "Raises: ZeroDivisionError('division by zero')"


def test_targets_become_named_starts_and_drains():
    decision = decide(Says((scale(3), scale(1, PREFILL))))
    start, drain = decision.actions
    assert isinstance(start, StartReplica)
    assert (start.replica_id, start.group) == ("decode-p-1000", DECODE.name)
    assert isinstance(drain, DrainReplica)
    assert drain.replica_id.startswith("prefill-p-")


wishes = st.lists(
    st.one_of(
        st.builds(scale, st.integers(0, 40), st.sampled_from([PREFILL, DECODE]), st.sampled_from(["", "", "x", "y"])),
        st.just(change()),
    ),
    max_size=6,
)


@given(st.lists(wishes, max_size=4), st.booleans())
def test_claims_never_overlap_and_nothing_is_lost_unsaid(proposals, guarded):
    guards = (RateOfChange(), Capacity()) if guarded else ()
    policies = tuple(Says(tuple(one)) for one in proposals)
    pipeline = Pipeline(policies=policies, guards=guards)
    decision = pipeline.decide(SNAPSHOT)
    claims = [claim for action in decision.actions for claim in action.claims]
    assert len(claims) == len(set(claims))
    assert all(0 <= replicas <= 128 for replicas in decision.targets.values())
    assert msgspec.json.encode(pipeline.decide(SNAPSHOT)) == msgspec.json.encode(decision)
