"""What is promised: bounds that are numbers, and that the hardware can keep when nothing else is to be done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet, Pace, ReplicaGroup
from cluster.kv import BLOCK_TOKENS
from cluster.performance import PerformanceModel
from cluster.slo import Slo
from controller.config.bounds import check_positive
from controller.config.groups import model_of
from workers.build_engine import performance_of


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """The least time that any group of a model needs."""

    seconds: float
    of: str
    """What takes it, and where."""


def check_slo(fleet: Fleet) -> None:
    """Any replica of a model may get a short prompt, only those that decode have a TPOT; the fastest says what can be promised."""
    for name, slo in fleet.slo.items():
        for field in slo.__struct_fields__:
            if (bound := getattr(slo, field)) is not None:
                check_positive(bound, f"slo.{name}.{field}")
    for model in fleet.models:
        groups = [group for group in fleet.replicas if model_of(fleet, group) is model]
        first = _floor(groups, f"a prompt of {BLOCK_TOKENS} tokens", lambda model: model.prefill_s(BLOCK_TOKENS))
        decoding = [group for group in groups if group.role.decodes]
        later = _floor(decoding, "a decode step of one sequence", lambda model: model.decode_step_s(1, BLOCK_TOKENS))
        for name, slo in fleet.slo.items():
            _check_floors(slo, {"ttft_s": first, "tpot_s": later, "e2e_s": first}, f"slo.{name}", model.name)


def _check_floors(slo: Slo, floors: dict[str, Floor | None], place: str, model: str) -> None:
    for field, floor in floors.items():
        bound = getattr(slo, field)
        if bound is not None and floor is not None and bound < floor.seconds:
            raise InvalidConfig(f"{place}.{field} {bound} is below {floor.seconds:.3g}, the floor of {model}: {floor.of}")


def _floor(groups: Sequence[ReplicaGroup], what: str, seconds: Callable[[PerformanceModel], float]) -> Floor | None:
    """None where a group goes at the machine's own speed, which nobody knows before it runs."""
    paces = [group.pace for group in groups]
    if None in paces or not paces:
        return None
    fastest_s, pace = min(((seconds(performance_of(pace)), pace) for pace in paces if pace), key=lambda found: found[0])
    return Floor(seconds=fastest_s, of=f"{what} of {pace.shape} on {_machine(pace)}")


def _machine(pace: Pace) -> str:
    many = f"{pace.tensor_parallel} x " if pace.tensor_parallel > 1 else ""
    return f"{many}{pace.accelerator}" + (f", {pace.speedup:g} times as fast" if pace.speedup != 1.0 else "")
