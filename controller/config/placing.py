"""A fleet expanded into named replicas in named workers on nodes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

from cluster.fleet import Fleet
from cluster.placement import ReplicaPlan, WorkerPlan
from controller.config.groups import model_of, nodes_of


def expand(fleet: Fleet) -> tuple[WorkerPlan, ...]:
    """Named workers with named replicas, on the nodes of each group's pool in turn. Equal fleets expand equally."""
    turns = {pool: itertools.cycle(nodes_of(fleet, pool)) for pool in {group.pool for group in fleet.replicas}}
    named: Counter[str] = Counter()
    plans = []
    for group in fleet.replicas:
        model = model_of(fleet, group)
        for hosted in _split(group.count, group.per_worker):
            node = next(turns[group.pool])
            accelerator = group.pace.accelerator if group.pace else node.accelerator
            stem = f"{group.role.value}-{accelerator}"
            replicas = []
            for _ in range(hosted):
                replicas.append(ReplicaPlan(replica_id=f"{stem}-{named[stem]}", group=group, model=model))
                named[stem] += 1
            plans.append(WorkerPlan(worker_id=f"worker-{len(plans)}", node=node, replicas=tuple(replicas)))
    return tuple(plans)


def _split(count: int, per_worker: int) -> Iterator[int]:
    for start in range(0, count, per_worker):
        yield min(per_worker, count - start)
