"""Claims about starting workers: nodes that cannot hold them are refused, and what a worker says is told in its own words."""

import asyncio
import json

import pytest
from ray.exceptions import RayActorError, RayTaskError

from cluster.errors import InvalidConfig, InvalidModel, MobulaError, Unreachable
from cluster.fleet import Fleet, ModelSpec, NodeSpec, ReplicaGroup
from cluster.placement import NODE_LABEL
from cluster.replica import Role
from controller.act import replicas
from controller.act.replicas import Workers, check_nodes
from controller.config import expand

GROUP = ReplicaGroup(role=Role.MIXED, count=2, kv_blocks=10)


@pytest.fixture
def fleet(tmp_path) -> Fleet:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Fleet(models=(ModelSpec(name="tiny", path=str(tmp_path)),), nodes=(NodeSpec(name="a"),), replicas=(GROUP,))


def ray_node(name: str, memory: float, *, alive: bool = True) -> dict:
    return {"Alive": alive, "Labels": {NODE_LABEL: name}, "Resources": {"memory": memory}}


KV = 2 * 10 * 2 * 2 * 2 * 16 * 16 * 4  # Replicas x blocks x (keys, values) x layers x heads x width x tokens x bytes.


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (ray_node("b", 1e12), "no Ray node carries the label mobula-node=a"),
        (ray_node("a", 1e12, alive=False), "no Ray node carries the label mobula-node=a"),
        (ray_node("a", KV - 1), f"nodes: a: its replicas' weights and KV are {KV} bytes, above {KV - 1}"),
    ],
)
def test_nodes_that_cannot_hold_the_fleet_are_refused(fleet, monkeypatch, node, words):
    monkeypatch.setattr(replicas.ray, "nodes", lambda: [node])
    with pytest.raises(InvalidConfig, match=words):
        check_nodes(fleet)


def test_nodes_that_hold_the_fleet_pass(fleet, monkeypatch):
    monkeypatch.setattr(replicas.ray, "nodes", lambda: [ray_node("a", KV)])
    check_nodes(fleet)


class Method:
    def __init__(self, answer):
        self.answer = answer

    async def remote(self, *_):
        if isinstance(self.answer, Exception):
            raise self.answer
        return await self.answer() if self.answer else None


class FakeActor:
    """A worker's handle whose `start` answers as told."""

    def __init__(self, start=None):
        self.start, self.drain, self.stop = Method(start), Method(None), Method(None)
        self.killed = False


@pytest.fixture
def started(fleet, monkeypatch):
    """Starts two workers of these handles."""

    async def start(*actors: FakeActor, bound_s: float = 60.0) -> None:
        waiting = iter(actors)

        class Remote:
            def options(self, **_):
                return self

            def remote(self, *_):
                return next(waiting)

        monkeypatch.setattr(replicas.ray, "remote", lambda _: Remote())
        monkeypatch.setattr(replicas.ray, "kill", lambda actor, no_restart: setattr(actor, "killed", True))
        await Workers(fleet, "secret", None).start(expand(fleet), lambda plan: None, bound_s=bound_s)

    return start


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (InvalidModel("model.safetensors is truncated"), InvalidModel, "mixed-cpu-0: model.safetensors is truncated"),
        (AssertionError("no CUDA here"), Unreachable, "mixed-cpu-0: AssertionError: no CUDA here"),
    ],
)
async def test_one_worker_that_fails_ends_all_and_its_words_are_told(started, error, kind, words):
    failing, other = FakeActor(RayTaskError("start", "traceback", error)), FakeActor(asyncio.Event().wait)
    with pytest.raises(MobulaError, match=words) as told:
        await started(failing, other)
    assert type(told.value) is kind
    assert failing.killed
    assert other.killed


async def test_a_worker_that_dies_while_it_starts_is_named_with_its_node(started):
    with pytest.raises(Unreachable, match="worker-0 on node a died while it started"):
        await started(FakeActor(RayActorError()), FakeActor())


async def test_what_a_worker_could_not_be_built_with_is_told_as_its_own_error(started):
    report = (
        "The actor died: ray::WorkerProcess.__init__()\n  File x, line 1\ncluster.errors.InvalidConfig: the shared secret is empty"
    )
    with pytest.raises(InvalidConfig, match=r"^worker-0 on node a: the shared secret is empty$"):
        await started(FakeActor(RayActorError(error_msg=report)), FakeActor())


async def test_workers_that_never_get_ready_are_bounded(started):
    stuck = FakeActor(asyncio.Event().wait)
    with pytest.raises(Unreachable, match=r"workers: not all of 2 were ready within 0 s"):
        await started(stuck, FakeActor(), bound_s=0.01)
    assert stuck.killed
