"""Single numbers of a snapshot by name: read, and written into a copy. What an explanation turns to see what would have been."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from cluster.snapshot import ClusterSnapshot, Demand, Group, Workload

_set = msgspec.structs.replace


def demand(model: str) -> str:
    return f"demand of {model}"


def prompt_length(model: str) -> str:
    return f"prompt length of {model}"


def output_length(model: str) -> str:
    return f"output length of {model}"


def ttft_slo(model: str) -> str:
    return f"TTFT SLO of {model}"


def tpot_slo(model: str) -> str:
    return f"TPOT SLO of {model}"


def attainment(model: str) -> str:
    return f"attainment of {model}"


def start_up(group: str) -> str:
    return f"start-up of {group}"


def least(group: str) -> str:
    return f"min_replicas of {group}"


def most(group: str) -> str:
    return f"max_replicas of {group}"


UNITS = {
    "demand": "requests/s",
    "prompt length": "tokens",
    "output length": "tokens",
    "TTFT SLO": "s",
    "TPOT SLO": "s",
    "attainment": "share",
    "start-up": "s",
    "min_replicas": "replicas",
    "max_replicas": "replicas",
}
_OF_GROUPS = {"start-up": "startup_s", "min_replicas": "min_replicas", "max_replicas": "max_replicas"}
"""And the fields that they turn."""


def read(snapshot: ClusterSnapshot, lever: str) -> float | None:
    """Its value, None where the snapshot has no such thing. Rates and lengths are means over the workload's buckets."""
    kind, _, name = lever.partition(" of ")
    if kind in _OF_GROUPS:
        group = snapshot.group_by_name.get(name)
        return None if group is None else float(getattr(group, _OF_GROUPS[kind]))
    workload = snapshot.workload_by_model.get(name)
    return None if workload is None else _READERS[kind](workload)


def write(snapshot: ClusterSnapshot, lever: str, value: float) -> ClusterSnapshot:
    """A snapshot in which it reads `value` > 0, all else as it was. The lever must read above 0 now."""
    kind, _, name = lever.partition(" of ")
    if kind in _OF_GROUPS:
        groups = (_turned(group, _OF_GROUPS[kind], value) if group.name == name else group for group in snapshot.groups)
        return _set(snapshot, groups=tuple(groups))
    workloads = tuple(_WRITERS[kind](one, value) if one.model == name else one for one in snapshot.workloads)
    return _set(snapshot, workloads=workloads)


def _turned(group: Group, field: str, value: float) -> Group:
    """A count turns when it has come to the next whole number."""
    was = getattr(group, field)
    if isinstance(was, int):
        value = math.floor(value) if value > was else math.ceil(value)
    return _set(group, **{field: value})


def _rate(workload: Workload) -> float:
    span_s = len(workload.buckets) * workload.bucket_s
    return sum(bucket.requests for bucket in workload.buckets) / span_s if span_s else 0.0


def _mean(field: str) -> Callable[[Workload], float]:
    def mean(workload: Workload) -> float:
        requests = sum(bucket.requests for bucket in workload.buckets)
        total: float = sum(getattr(bucket, field) for bucket in workload.buckets)
        return total / requests if requests else 0.0

    return mean


def _scale(workload: Workload, change: Callable[[Demand], Demand]) -> Workload:
    return _set(workload, buckets=tuple(change(bucket) for bucket in workload.buckets))


def _with_rate(workload: Workload, value: float) -> Workload:
    factor = value / _rate(workload)
    return _scale(
        workload, lambda bucket: Demand(**{name: number * factor for name, number in msgspec.structs.asdict(bucket).items()})
    )


def _with_prompt(workload: Workload, value: float) -> Workload:
    factor = value / _mean("prompt_tokens")(workload)
    return _scale(
        workload,
        lambda bucket: _set(
            bucket,
            prompt_tokens=bucket.prompt_tokens * factor,
            prompt_tokens_squared=bucket.prompt_tokens_squared * factor * factor,
        ),
    )


def _with_output(workload: Workload, value: float) -> Workload:
    factor = value / _mean("output_tokens")(workload)
    return _scale(workload, lambda bucket: _set(bucket, output_tokens=bucket.output_tokens * factor))


_READERS: dict[str, Callable[[Workload], float | None]] = {
    "demand": _rate,
    "prompt length": _mean("prompt_tokens"),
    "output length": _mean("output_tokens"),
    "attainment": lambda workload: workload.attainment,
    "TTFT SLO": lambda workload: workload.slo.ttft_s,
    "TPOT SLO": lambda workload: workload.slo.tpot_s,
}
_WRITERS: dict[str, Callable[[Workload, float], Workload]] = {
    "demand": _with_rate,
    "prompt length": _with_prompt,
    "output length": _with_output,
    "attainment": lambda workload, value: _set(workload, attainment=value),
    "TTFT SLO": lambda workload, value: _set(workload, slo=_set(workload.slo, ttft_s=value)),
    "TPOT SLO": lambda workload, value: _set(workload, slo=_set(workload.slo, tpot_s=value)),
}
