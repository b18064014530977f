"""How much of a traffic each fleet of a space can carry, by the formulas of `policies.sizing`: before anything is simulated.

Two figures for each fleet, as multiples of the traffic. `most`: no fleet of this kind carries more, at the traffic's mean rate with
nothing left to chance and every known prefix cached; below the goal it is hopeless. `expected`: with the margins that the live
controller sizes by, of the busiest minute; it says which fleet to try first, and excludes none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
import numpy as np
from numpy.typing import NDArray

from cluster.performance import PerformanceModel
from cluster.replica import Role
from cluster.slo import Slo
from cluster.snapshot import ClusterSnapshot, Group
from cluster.step_table import StepTable
from policies.flow import Flow
from policies.shares import capacity
from policies.sizing import Bounds
from simulator.machines import Machine
from simulator.space import Space
from simulator.survey import Survey

AMPLE = 64.0  # Multiples of the traffic that are told apart; a fleet that carries more is far above its need.
TRUST = 0.85
"""Of `most` against the goal. Measured tables bend where the formulas are affine: by up to about 15 % in `cluster.measured`'s."""
LENIENT = Bounds(missed_share=1.0, utilisation=1.0, kv_share=1.0, batch_sigmas=0.0, length_sigmas=0.0)
"""Means alone: whatever chance does, no fleet that fails these keeps up."""

Shares = NDArray[np.float64]
"""Of the traffic, by fleet."""


class Foresight:
    """Of all fleets of a space."""

    def __init__(self, space: Space, machines: Mapping[str, Machine], survey: Survey, slos: Mapping[str, Slo]) -> None:
        self._space, self._groups = space, [_group(machines[name]) for name in space.groups]
        loose, strict = _bound(slos, max_of=True), _bound(slos, max_of=False)
        apart = self._prefilled_apart()
        self.most = self._carried(survey.mean, loose, LENIENT, apart, optimistic=True)
        self.expected = self._carried(survey.busy, strict, Bounds(), apart, optimistic=False)

    def _prefilled_apart(self) -> NDArray[np.bool_]:
        return self._space.counts[:, [group.role is Role.PREFILL for group in self._groups]].sum(axis=1) > 0

    def _carried(self, flow: Flow, slo: Slo, bounds: Bounds, apart: NDArray[np.bool_], *, optimistic: bool) -> Shares:
        """Where prompts may be computed apart, conditional disaggregation takes the better way; so does the estimate."""
        with_prompts = self._sum(flow, slo, bounds, lambda group: group.role.decodes, apart=False)
        if not apart.any():
            return with_prompts
        decoding = self._sum(
            flow, slo, bounds, lambda group: group.role is Role.DECODE or (optimistic and group.role.decodes), apart=True
        )
        if optimistic:
            return np.where(apart, np.maximum(decoding, with_prompts), with_prompts)
        mixed = self._sum(flow, slo, bounds, lambda group: group.role is Role.MIXED, apart=True)
        prefilling = self._sum(flow, slo, bounds, lambda group: group.role is Role.PREFILL, apart=True)
        return np.where(apart, np.maximum(np.minimum(decoding, prefilling) + mixed, with_prompts), with_prompts)

    def _sum(self, flow: Flow, slo: Slo, bounds: Bounds, chosen: Callable[[Group], bool], *, apart: bool) -> Shares:
        """What the chosen groups carry together. apart: prompts are computed elsewhere, for those that could have it so."""
        total = np.zeros(len(self._space.counts))
        prefilling = Group(
            model="", role=Role.PREFILL, pool="", min_replicas=0, max_replicas=1, wanted=1, performance=None, kv_tokens=1,
            max_running=1, step_budget_tokens=1, startup_s=1.0,
        )  # fmt: skip
        for index, group in enumerate(self._groups):
            if chosen(group):
                as_decode = apart and bounds is LENIENT and group.role is Role.MIXED
                one = msgspec.structs.replace(group, role=Role.DECODE) if as_decode else group
                snapshot = ClusterSnapshot(now_s=0.0, groups=(prefilling,) if apart else ())
                replicas = self._space.counts[:, index]
                shares = [
                    AMPLE * capacity(snapshot, one, count, flow.times(AMPLE), slo, bounds) if count else 0.0
                    for count in range(int(replicas.max()) + 1)
                ]
                total += np.array(shares)[replicas]
        return total


def performance_of(machine: Machine) -> PerformanceModel:
    """What its steps truly take, in the affine form that formulas need."""
    return machine.true.affine() if isinstance(machine.true, StepTable) else machine.true


def _group(machine: Machine) -> Group:
    spec = machine.spec
    return Group(
        model="",
        role=spec.role,
        pool=spec.pool,
        min_replicas=0,
        max_replicas=spec.count,
        wanted=spec.count,
        performance=performance_of(machine),
        kv_tokens=spec.kv_blocks * spec.block_tokens,
        max_running=spec.max_running,
        step_budget_tokens=spec.step_budget_tokens,
        startup_s=spec.startup_s,
    )


def _bound(slos: Mapping[str, Slo], *, max_of: bool) -> Slo:
    """The loosest bound of each kind, or the strictest. None is looser than any."""

    def among(field: str) -> float | None:
        bounds = [getattr(slo, field) for slo in slos.values()]
        given = [bound for bound in bounds if bound is not None]
        if not given or (max_of and len(given) < len(bounds)):
            return None
        return max(given) if max_of else min(given)

    return Slo(ttft_s=among("ttft_s"), tpot_s=among("tpot_s"))
