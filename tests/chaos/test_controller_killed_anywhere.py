"""The controller killed at every await of a scale-out, a role change and a drain: nothing lost, orphaned or started twice."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cluster.replica import Phase, Role
from tests.chaos.world import Script, World

CHANGE_AT_S = 1006.0
DONE_S = 1012.0
SETTLED_S = 1024.0


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet of one prefill and two decode replicas, and what becomes of it."""

    script: Script
    prefill: int
    decode: int
    starts: int


SCENES = {
    "scale-out": Scene(script=Script(at_s=CHANGE_AT_S, decode=4), prefill=1, decode=4, starts=5),
    "role change": Scene(script=Script(at_s=CHANGE_AT_S, change=True), prefill=2, decode=1, starts=3),
    "drain": Scene(script=Script(at_s=CHANGE_AT_S, decode=1), prefill=1, decode=1, starts=3),
}


@pytest.fixture
def directory() -> Iterator[Path]:
    """In memory where that can be: a journal is flushed to its disk at every pass."""
    shm = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=shm) as name:
        yield Path(name)


def play(directory: Path, scene: Scene, kill_at: int | None) -> tuple[int, list[str]]:
    """The controller is killed at a step of the change, and another one takes its place. Steps of the change, and what is wrong."""
    directory.mkdir()
    world = World(directory, scene.script)
    world.new_controller()
    world.run(CHANGE_AT_S)
    steps = world.run(DONE_S, kill_at)
    if kill_at is not None:
        world.new_controller()
    world.run(SETTLED_S)
    found = faults(world, scene)
    world.close()
    return steps, found


def faults(world: World, scene: Scene) -> list[str]:
    rows = world.controller.registry.table.replicas
    roles = Counter(worker.plan.group.role for worker in world.workers.values() if worker.phase is Phase.READY)
    found = []
    if (roles[Role.PREFILL], roles[Role.DECODE]) != (scene.prefill, scene.decode):
        found.append(f"in the end {roles}")
    if rows.keys() != {worker.plan.replica_id for worker in world.workers.values()}:
        found.append(f"orphans: {set(world.workers)} run, {set(rows)} are known")
    if world.started.most_common(1)[0][1] > 1 or len(world.started) != scene.starts:
        found.append(f"started {world.started}")
    if world.lost_streams:
        found.append(f"{world.lost_streams} streams lost")
    return found


@pytest.mark.parametrize("name", SCENES)
def test_killed_at_every_await_it_leaves_what_an_undisturbed_one_does(directory: Path, name: str):
    scene = SCENES[name]
    steps, found = play(directory / "undisturbed", scene, None)
    assert found == []
    wrong = {kill_at: play(directory / str(kill_at), scene, kill_at)[1] for kill_at in range(1, steps + 1)}
    assert {kill_at: found for kill_at, found in wrong.items() if found} == {}
