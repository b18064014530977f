"""Replica groups: what each is, how many it may have, whether its pool holds them, and whether they fit together."""

from __future__ import annotations

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet, ModelSpec, NodeSpec, Pace, ReplicaGroup
from cluster.hardware import ACCELERATORS
from cluster.models import MODELS
from cluster.performance import roofline
from cluster.placement import group_of, limits_of, slots_of
from controller.config.bounds import check_at_least, check_at_most, check_known, check_positive, placed
from controller.spelling import did_you_mean
from workers.checkpoint import check_dtype

MAX_REPLICAS = 10_000  # The largest fleet whose decisions are budgeted.
MAX_THREADS = 1024  # Cores of the largest machines.


def model_of(fleet: Fleet, group: ReplicaGroup) -> ModelSpec:
    """The model that a group serves: the one it names, or the only one."""
    return next(model for model in fleet.models if model.name == (group.model or fleet.models[0].name))


def nodes_of(fleet: Fleet, pool: str) -> tuple[NodeSpec, ...]:
    """The nodes that may host the groups of a pool."""
    return tuple(node for node in fleet.nodes if node.pool == pool)


def check_groups(fleet: Fleet) -> None:
    """Each by itself, then together."""
    for index, group in enumerate(fleet.replicas):
        with placed(f"replicas[{index}]"):
            _check_numbers(group)
            _check_schedules(group)
            _check_references(fleet, group)
            _check_engine(group)
            if group.pace is not None:
                _check_pace(group, group.pace)
    most = sum(limits_of(group)[1] for group in fleet.replicas)
    check_at_most(most, MAX_REPLICAS, "replicas: the sum of all max_replicas")
    _check_roles(fleet)
    _check_unique(fleet)
    _check_pools(fleet)


def _check_numbers(group: ReplicaGroup) -> None:
    low, high = limits_of(group)
    check_at_least(low, 0, "min_replicas" if group.min_replicas is not None else "count")
    check_at_least(group.count, 0, "count")
    if group.count == 0 and group.min_replicas != 0:
        raise InvalidConfig("count 0 is below 1; only a group with min_replicas 0 may start with none")
    if group.min_replicas is not None and low > high:
        raise InvalidConfig(f"min_replicas {low} is above {high}, its {'count' if group.max_replicas is None else 'max_replicas'}")
    if not low <= group.count <= high:
        raise InvalidConfig(f"count {group.count} is outside [{low}, {high}], its min_replicas and max_replicas")
    for field in ("per_worker", "kv_blocks", "block_tokens", "max_running", "step_budget_tokens", "threads"):
        check_at_least(getattr(group, field), 1, field)
    check_at_most(group.threads, MAX_THREADS, "threads")
    if group.step_budget_tokens < group.max_running:
        raise InvalidConfig(
            f"step_budget_tokens {group.step_budget_tokens} is below max_running {group.max_running}: "
            "one step could not hold every decoding request"
        )
    check_positive(group.startup_s, "startup_s")
    check_positive(group.start_timeout_s, "start_timeout_s")
    if group.startup_s > group.start_timeout_s:
        raise InvalidConfig(
            f"startup_s {group.startup_s} is above start_timeout_s {group.start_timeout_s}: every start would count as failed"
        )


def _check_schedules(group: ReplicaGroup) -> None:
    """They narrow the group's limits: what a pool must have room for is known without a calendar."""
    low, high = limits_of(group)
    for number, schedule in enumerate(group.schedules):
        for field in ("min_replicas", "max_replicas"):
            replicas = getattr(schedule, field)
            if replicas is not None and not low <= replicas <= high:
                raise InvalidConfig(
                    f"schedules[{number}].{field} {replicas} is outside [{low}, {high}], the group's min_replicas and max_replicas"
                )


def _check_references(fleet: Fleet, group: ReplicaGroup) -> None:
    models = [model.name for model in fleet.models]
    if not group.model and len(models) > 1:
        raise InvalidConfig(f"model is left out, but there are {len(models)} models: {', '.join(models)}")
    if group.model and group.model not in models:
        raise InvalidConfig(f"model {group.model} is no model of this file{did_you_mean(group.model, models)}")
    if not nodes_of(fleet, group.pool):
        pools = {node.pool for node in fleet.nodes}
        raise InvalidConfig(f"pool {group.pool} has no node{did_you_mean(group.pool, pools)}")


def _check_engine(group: ReplicaGroup) -> None:
    if group.per_worker > 1 and group.engine != "emulated":
        raise InvalidConfig(f"per_worker {group.per_worker} above 1: only emulated replicas share a worker process")
    if group.engine == "emulated" and group.pace is None:
        raise InvalidConfig("pace is missing: an emulated engine has no other source of step times")
    if group.engine == "torch":
        check_dtype(group.dtype, group.device)


def _check_pace(group: ReplicaGroup, pace: Pace) -> None:
    """Whether the machine that is played could hold the model that is played, with this much KV."""
    with placed("pace"):
        check_known("model shape", pace.shape, MODELS, "shape")
        check_known("accelerator", pace.accelerator, ACCELERATORS, "accelerator")
        check_at_least(pace.tensor_parallel, 1, "tensor_parallel")
        check_positive(pace.speedup, "speedup")
        shape, accelerator = MODELS[pace.shape], ACCELERATORS[pace.accelerator]
        roofline(shape, accelerator, pace.tensor_parallel)
    weights, room = shape.weight_bytes(), accelerator.memory_bytes * pace.tensor_parallel
    kv = group.kv_blocks * group.block_tokens * shape.kv_bytes_per_token()
    if weights + kv > room:
        raise InvalidConfig(
            f"kv_blocks {group.kv_blocks} of {shape.name} are {kv} bytes beside {weights} of weights, "
            f"above {room}, the memory of {pace.tensor_parallel} x {accelerator.name}"
        )


def _check_unique(fleet: Fleet) -> None:
    first: dict[str, int] = {}
    for index, group in enumerate(fleet.replicas):
        name = group_of(fleet, group)
        if first.setdefault(name, index) != index:
            raise InvalidConfig(
                f"replicas[{index}] is {name}, as replicas[{first[name]}] is: two pools of one name; "
                "groups differ in model, role or pool"
            )


def _check_roles(fleet: Fleet) -> None:
    for model in fleet.models:
        groups = [group for group in fleet.replicas if model_of(fleet, group) is model]
        if not any(group.role.decodes and limits_of(group)[1] > 0 for group in groups):
            raise InvalidConfig(f"replicas: none decodes model {model.name}; give it one of role decode or mixed")
        for field in ("block_tokens", "dtype"):
            values = {getattr(group, field): index for index, group in enumerate(fleet.replicas) if group in groups}
            if len(values) > 1:
                given = " but ".join(f"{value} in replicas[{index}]" for value, index in values.items())
                raise InvalidConfig(f"replicas: {field} is {given}; those of one model hand KV over to each other and must agree")


def _check_pools(fleet: Fleet) -> None:
    """Whether all that is started has a place. What may be added later must find one when it is wanted."""
    for pool in sorted({group.pool for group in fleet.replicas}):
        slots = sum(slots_of(fleet, node) for node in nodes_of(fleet, pool))
        counts = {f"replicas[{index}]": group.count for index, group in enumerate(fleet.replicas) if group.pool == pool}
        if sum(counts.values()) > slots:
            asked = " + ".join(f"{count} of {place}" for place, count in counts.items())
            raise InvalidConfig(
                f"nodes: pool {pool} has {slots} slots, below {sum(counts.values())}, the replicas it starts: {asked}"
            )
