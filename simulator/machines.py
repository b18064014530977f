"""What each group's replicas truly are, and what the fleet is told that they are: step times, memory, and KV to move."""

from __future__ import annotations

import msgspec

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet, ReplicaGroup
from cluster.hardware import accelerator
from cluster.kv import KvLayout
from cluster.measured import table_for
from cluster.models import ModelShape, model_shape
from cluster.performance import PerformanceModel
from cluster.placement import group_of
from cluster.slo import Slo
from cluster.step_table import StepTable, outside, read_table
from simulator.world import World
from workers.build_engine import performance_of

MEMORY_SHARE = 0.9  # Of an accelerator's, for weights and KV; vLLM's default.


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Of one group."""

    group: str
    spec: ReplicaGroup
    believed: PerformanceModel
    true: PerformanceModel | StepTable
    layout: KvLayout
    devices: int
    """Accelerators of one replica."""
    node_bytes_per_s: float
    """KV between replicas on one node."""

    @property
    def context_tokens(self) -> int:
        return self.spec.kv_blocks * self.spec.block_tokens


def machines_of(fleet: Fleet, world: World) -> dict[str, Machine]:
    """By group. Raises InvalidConfig for a group of unknown speed, and for one whose accelerators cannot hold it."""
    tables = {name: read_table(path) for name, path in world.tables.items()}
    made = {}
    for index, spec in enumerate(fleet.replicas):
        name = group_of(fleet, spec)
        table = tables.get(name) or tables.get(spec.role.value)
        machine = _machine(name, spec, table, world, f"replicas[{index}]")
        layout = world.layouts.get(name) or world.layouts.get(spec.role.value)
        made[name] = machine if layout is None else msgspec.structs.replace(machine, layout=layout)
    for what, named in (("tables", tables), ("layouts", world.layouts)):
        if unknown := set(named) - set(made) - {spec.role.value for spec in fleet.replicas}:
            raise InvalidConfig(f"{what}: {sorted(unknown)[0]} is no group of this fleet: {', '.join(made)}")
    return made


def _machine(name: str, spec: ReplicaGroup, table: StepTable | None, world: World, place: str) -> Machine:
    pace = spec.pace
    if pace is None:
        if table is None:
            raise InvalidConfig(
                f"{place}: {name} has no pace, so nobody knows how fast it is; measure it with `mobula calibrate` and name the "
                f"file under `tables` in the world, or give it a pace"
            )
        layout = KvLayout(layers=1, kv_heads=1, head_dim=1, block_tokens=spec.block_tokens)
        return Machine(group=name, spec=spec, believed=table.affine(), true=table, layout=layout, devices=1, node_bytes_per_s=1.5e9)
    shape, device = model_shape(pace.shape), accelerator(pace.accelerator)
    believed = performance_of(pace)
    true: PerformanceModel | StepTable = believed
    if table is not None:
        true = table
    elif world.step_times == "measured":
        true = table_for(pace.shape, pace.accelerator, pace.tensor_parallel).scaled(pace.speedup)
    layout = KvLayout(
        layers=shape.layers, kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype="bfloat16", block_tokens=spec.block_tokens
    )
    _check_memory(shape, spec, layout, pace.tensor_parallel * device.memory_bytes, place)
    return Machine(
        group=name,
        spec=spec,
        believed=believed,
        true=true,
        layout=layout,
        devices=pace.tensor_parallel,
        node_bytes_per_s=device.link_bytes_s / 2,
    )


def _check_memory(shape: ModelShape, spec: ReplicaGroup, layout: KvLayout, memory_bytes: int, place: str) -> None:
    weights, cache = shape.weight_bytes(), spec.kv_blocks * layout.block_bytes
    bound = MEMORY_SHARE * memory_bytes
    if weights > bound:
        raise InvalidConfig(f"{place}: the weights of {shape.name}, {weights / 1e9:.1f} GB, are above {bound / 1e9:.1f} GB, "
                            f"{MEMORY_SHARE:.0%} of its accelerators' memory")  # fmt: skip
    if weights + cache > bound:
        most = int((bound - weights) // layout.block_bytes)
        raise InvalidConfig(
            f"{place}.kv_blocks {spec.kv_blocks}: with the weights they take {(weights + cache) / 1e9:.1f} GB, above "
            f"{bound / 1e9:.1f} GB, {MEMORY_SHARE:.0%} of its accelerators' memory; at most {most} fit"
        )


def model_asked(fleet: Fleet, name: str) -> str:
    """The model that a workload asks for: traces name none. Raises InvalidConfig where it is not this fleet's, or not clear."""
    models = [model.name for model in fleet.models]
    if name and name not in models:
        raise InvalidConfig(f"model {name!r} is none of this fleet's: {', '.join(models)}")
    if not name and len(models) > 1:
        raise InvalidConfig(f"this fleet serves {', '.join(models)}: say which of them the workload asks for (--model)")
    return name or models[0]


def check_slo(name: str, slo: Slo, machines: dict[str, Machine]) -> None:
    """Raise InvalidConfig for a bound that no replica can meet, even with one request alone."""
    prefill_s = min((one.true.prefill_s(1) for one in machines.values() if one.spec.role.prefills_for_others), default=None)
    decode_s = min((one.true.decode_step_s(1, 1) for one in machines.values() if one.spec.role.decodes), default=None)
    first_s = prefill_s if prefill_s is not None else min(one.true.prefill_s(1) for one in machines.values())
    for bound, floor, what in ((slo.ttft_s, first_s, "ttft_s"), (slo.tpot_s, decode_s, "tpot_s")):
        if bound is not None and floor is not None and bound < floor:
            raise InvalidConfig(
                f"slo.{name}.{what} {bound} is below {floor:.4g}, the fastest replica's, idle and with a prompt of one token"
            )


def warnings_of(machines: dict[str, Machine], prompt_tokens: int) -> list[str]:
    """What is simulated beyond where it was measured. prompt_tokens: of the longest prompt; a step computes its budget at most."""
    said: dict[str, list[str]] = {}
    for one in machines.values():
        if isinstance(one.true, StepTable):
            for words in _beyond(one.true, min(prompt_tokens, one.spec.step_budget_tokens)):
                said.setdefault(words, []).append(one.group)
    return [f"{', '.join(groups)}: {words}" for words, groups in said.items()]


def _beyond(table: StepTable, prompt_tokens: int) -> list[str]:
    """Without words on prompts where none was measured: `derived` has them."""
    beyond = outside(table.fit, prompt_tokens=prompt_tokens) if table.fit.prefill_tokens[1] else None
    return [words for words in (table.fit.derived, beyond) if words]
