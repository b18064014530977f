"""A space holds every fleet that could be, each on the cheapest nodes that hold it."""

from __future__ import annotations

import itertools

import pytest

from cluster.errors import InvalidConfig
from controller.config import check
from simulator.space import Space, SpaceFile
from tests.simulator.comparing import CLUSTER, fleet


def test_every_fleet_that_decodes_and_has_room_is_there_once():
    space = Space(fleet())
    assert sorted(map(tuple, space.counts.tolist())) == [
        (h100, l4) for h100, l4 in itertools.product(range(3), range(4)) if h100 + l4 > 0
    ]


def test_nodes_are_the_cheapest_that_hold_the_replicas():
    space = Space(fleet(), SpaceFile(nodes={"l4": 2}))  # Two like l0, of one slot.
    assert space.find([0, 3]) is None
    space = Space(fleet())
    nodes = {replicas: [node.name for node in space.build(space.find([0, replicas])).nodes] for replicas in (1, 2, 3)}
    assert nodes == {1: ["l0"], 2: ["l1"], 3: ["l0", "l1"]}
    assert [space.usd_per_hour[space.find([0, replicas])] for replicas in (1, 2, 3)] == [0.8, 1.4, 2.2]


def test_price_is_that_of_the_best_set_of_nodes_by_trying_all():
    nodes = [(1, 0.9), (2, 1.3), (2, 1.9), (3, 2.5), (5, 3.6)]
    lines = [
        f"  - {{name: n{number}, pool: l4, accelerator: l4, slots: {slots}, price_usd_per_hour: {usd}}}"
        for number, (slots, usd) in enumerate(nodes)
    ]
    head, _, tail = CLUSTER.partition("  - {name: l0")
    text = head + "\n".join(lines) + "\nreplicas:" + tail.partition("replicas:")[2].replace("max_replicas: 3", "max_replicas: 13")
    space = Space(fleet(text))
    for replicas in range(1, 14):
        sets = [chosen for size in range(6) for chosen in itertools.combinations(nodes, size)]
        least = min(sum(usd for _, usd in chosen) for chosen in sets if sum(slots for slots, _ in chosen) >= replicas)
        built = space.build(space.find([0, replicas]))
        assert space.usd_per_hour[space.find([0, replicas])] == pytest.approx(least)
        assert sum(node.price_usd_per_hour for node in built.nodes) == pytest.approx(least)


def test_fleet_of_the_space_can_be_started_and_does_not_scale():
    space = Space(fleet())
    for number in range(len(space.counts)):
        built = space.build(number)
        check(built, files=False)
        assert all(group.count == group.min_replicas == group.max_replicas > 0 for group in built.replicas)


def test_ranges_and_machines_may_be_asked_for():
    space = Space(fleet(), SpaceFile(replicas={"m/decode/l4": (2, 5), "m/decode/h100": (0, 0)}, nodes={"l4": 8}))
    assert space.counts[:, 1].tolist() == [2, 3, 4, 5]
    assert len(space.build(0).nodes) == 2


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (SpaceFile(replicas={"decode": (0, 1)}), r"replicas\.decode is the role of 2 groups"),
        (SpaceFile(replicas={"cache": (0, 1)}), r"replicas\.cache is no group; groups are m/decode/h100, m/decode/l4"),
        (SpaceFile(replicas={"m/decode/l4": (3, 1)}), r"the fewest, 3, are above the most, 1"),
        (SpaceFile(nodes={"l40": 3}), r"nodes\.l40: no group is on a pool of that name; did you mean l4"),
        (SpaceFile(replicas={"m/decode/l4": (0, 2000), "m/decode/h100": (0, 2000)}), r"4004001 fleets are above 2000000"),
        (SpaceFile(replicas={"m/decode/l4": (4, 9), "m/decode/h100": (9, 9)}), r"no fleet in the space"),
    ],
)
def test_space_that_cannot_be_is_refused(asked, said):
    with pytest.raises(InvalidConfig, match=said):
        Space(fleet(), asked)


def test_node_without_a_price_is_named():
    with pytest.raises(InvalidConfig, match=r"node l0 has price_usd_per_hour 0\.0"):
        Space(fleet(CLUSTER.replace("price_usd_per_hour: 0.8", "price_usd_per_hour: 0")))
