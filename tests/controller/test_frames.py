"""Snapshots as bytes and back."""

import random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.replica import Load, Phase
from cluster.snapshot import ClusterSnapshot
from controller.frames import decode, encode
from tests.policies.clusters import NOW_S, cluster, group, replica, steady, workload

FINE = st.floats(0, 1e9, allow_nan=False)
loads = st.none() | st.builds(
    Load,
    replica_id=st.just("r"),
    sequence=st.integers(0, 2**40),
    at_s=FINE,
    phase=st.sampled_from(Phase),
    running=st.integers(0, 300),
    waiting=st.integers(0, 300),
    waiting_tokens=st.integers(0, 10**7),
    kv_tokens=st.integers(0, 10**8),
    kv_blocks_used=st.integers(0, 10**6),
    step_s=st.floats(0, 1).map(lambda value: round(value, 5)) | FINE,
    slowdown=st.floats(0.25, 4.0).map(lambda value: round(value, 2)) | FINE,
    power_w=st.integers(0, 1000).map(float) | FINE,
    overrun_share=st.floats(0, 1),
)
OF = group()


@st.composite
def snapshots(draw) -> ClusterSnapshot:
    names = draw(st.lists(st.sampled_from("abcdefgh"), unique=True).map(sorted))
    members = []
    for name in names:
        load = draw(loads)
        bare = replica(name, OF, draw(st.sampled_from(Phase)), load_age_s=draw(FINE))
        members.append(msgspec.structs.replace(bare, load=load and msgspec.structs.replace(load, replica_id=name)))
    rates = draw(st.lists(st.integers(0, 50), max_size=8))
    return cluster([OF], [workload(rates)] * draw(st.integers(0, 1)), replicas=tuple(members), now_s=draw(FINE))


@settings(max_examples=60, deadline=None)
@given(st.lists(snapshots(), min_size=1, max_size=4))
def test_decoding_gives_the_identical_snapshots(sequence):
    before = None
    for snapshot in sequence:
        again = decode(encode(snapshot, before), before)
        assert again == snapshot
        before = again


def test_a_thousand_busy_replicas_make_small_frames():
    """A gigabyte a day leaves 12.4 kB for each second, decision included."""
    rng = random.Random(0)

    def at(second: int, before: ClusterSnapshot | None) -> ClusterSnapshot:
        old = {one.replica_id: one.load for one in before.replicas} if before else {}
        members = []
        for number in range(1000):
            name = f"decode-p-{number:04}"
            was = old.get(name)
            load = Load(
                replica_id=name,
                sequence=second * 5,
                at_s=round(NOW_S + second - rng.random() * 0.2, 1),
                phase=Phase.READY,
                running=max(0, (was.running if was else 40) + rng.randint(-2, 2)),
                waiting=rng.choice((0, 0, 0, 1)),
                waiting_tokens=rng.choice((0, 0, 0, rng.randint(1, 2000))),
                kv_tokens=max(0, (was.kv_tokens if was else 60_000) + rng.randint(-2000, 2000)),
                kv_blocks_used=max(0, (was.kv_blocks_used if was else 4000) + rng.randint(-120, 120)),
                slowdown=round(1.0 + rng.gauss(0, 0.01), 2),
                step_s=round(0.012 + rng.gauss(0, 0.0002), 5),
                power_w=round(450 + rng.gauss(0, 8), 0),
                overrun_share=0.0,
            )
            members.append(replica(name, OF, load=load, load_age_s=round(rng.random() * 0.2, 1)))
        return cluster([OF], [steady(10.0)], replicas=tuple(members), now_s=NOW_S + second)

    first = at(0, None)
    second = at(1, first)
    assert len(encode(second, first)) < 11_000
    assert len(encode(first)) < 60_000
