"""A world may say what KV a group moves, where that is not the KV of the model it is paced as."""

from __future__ import annotations

import pytest

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet, ModelSpec, NodeSpec, Pace, ReplicaGroup
from cluster.kv import KvLayout
from cluster.replica import Role
from simulator.machines import machines_of
from simulator.world import World

PACE = Pace(shape="llama-3.1-8b", accelerator="l4")
FLEET = Fleet(
    models=(ModelSpec(name="m", path="m"),),
    nodes=(NodeSpec(name="a", accelerator="l4"),),
    replicas=tuple(ReplicaGroup(role=role, pace=PACE, kv_blocks=256) for role in (Role.PREFILL, Role.DECODE)),
)
TINY = KvLayout(layers=3, kv_heads=2, head_dim=32)


def test_a_group_moves_the_kv_of_the_world_and_the_others_that_of_their_pace():
    machines = machines_of(FLEET, World(layouts={"decode": TINY}))
    assert machines["m/decode/default"].layout == TINY
    assert machines["m/prefill/default"].layout.layers == 32


def test_a_layout_of_no_group_is_refused_by_name():
    with pytest.raises(InvalidConfig, match="layouts: expert is no group"):
        machines_of(FLEET, World(layouts={"expert": TINY}))
