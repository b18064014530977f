"""How many replicas of each group: up for what a sure rise needs once a newcomer is ready, down for what a sure fall left.

Between the two nothing happens, which is what keeps a constant load still: to go down, the busiest minute of the last few, its
upper bound and a margin more, must fit on fewer; to go up, a lower bound must not fit on what there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from cluster.actions import Action, Reason, ScaleRole
from cluster.ranges import at_least, positive
from cluster.snapshot import ClusterSnapshot, Group, Workload
from policies import levers
from policies.flow import Flow, Window, fallen, kept, reaches_back, risen
from policies.shares import fits_of, shares
from policies.sizing import Bounds, smallest


class Scaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The policy."""

    window: Window = Window()
    bounds: Bounds = Bounds()
    down_margin: float = 1.1
    """Times the fallen flow's upper bound the smaller number must still carry: the model's own error is 5 to 12 % on H100."""
    settle_s: float = 30.0
    """After the target rose it does not fall for so long: what was started has not yet shown its effect."""
    backlog_s: float = 10.0
    """Time in which requests that queue are to be worked off."""
    emergency: bool = False

    def __post_init__(self) -> None:
        at_least(1.0, down_margin=self.down_margin)
        at_least(0.0, settle_s=self.settle_s)
        positive(backlog_s=self.backlog_s)

    def decide(self, snapshot: ClusterSnapshot, accepted: Sequence[Action]) -> Sequence[Action]:
        parts = {workload.model: self._shares(snapshot, workload) for workload in snapshot.workloads}
        return [self._scale(snapshot, group, parts.get(group.model, {}).get(group.name, 0.0)) for group in snapshot.groups]

    def _scale(self, snapshot: ClusterSnapshot, group: Group, share: float) -> ScaleRole:
        low, high = group.min_replicas, group.max_replicas
        workload = snapshot.workload_by_model.get(group.model)
        if workload is None or group.performance is None:
            unknown = "what a replica can do" if workload else f"the demand of {group.model}"
            return _target(group, group.wanted, low, high, f"{unknown} is not known yet", {})
        up = self.rise(workload, group.startup_s).times(share)
        down = fallen(workload, self.window).times(share * self.down_margin)
        carries_rise = fits_of(snapshot, group, up, workload.slo, self.bounds)
        carries_rest = fits_of(snapshot, group, down, workload.slo, self.bounds)
        needed = smallest(carries_rise)
        enough = max(needed, smallest(carries_rest))
        numbers = {
            "rate_rps": up.rate_rps,
            "bound_rate_rps": down.rate_rps,
            "prompt_tokens": up.prompt_tokens,
            "output_tokens": up.output_tokens,
            "needed": needed,
            "enough": enough,
            "wanted": group.wanted,
            "low": low,
            "high": high,
        }
        if needed > group.wanted:
            why = f"{group.wanted} do not carry {up.rate_rps:.2f} requests/s: {carries_rise(group.wanted).binding}"
            return _target(group, needed, low, high, why, numbers)
        if enough < group.wanted and self._settled(group, snapshot.now_s) and reaches_back(workload, self.window):
            nearest = carries_rest(enough).binding
            bound = f"{enough} carry {down.rate_rps:.2f} requests/s, an upper bound with its margin; {nearest} is nearest"
            if not kept(workload, self.window):
                why = f"{workload.attainment:.1%} were inside their SLO, below {self.window.kept_share:.0%}: nothing is taken away"
                return _target(group, group.wanted, low, high, why, numbers)
            return _target(group, enough, low, high, bound if down.rate_rps > 0.0 else "nothing arrives", numbers)
        return _target(group, group.wanted, low, high, "neither a sure rise nor a sure fall", numbers)

    def rise(self, workload: Workload, startup_s: float) -> Flow:
        """The flow to be ready for by the time a replica started now is: trend, and what already queues."""
        flow = risen(workload, self.window, ahead_s=startup_s)
        return flow.at(flow.rate_rps + workload.queued / self.backlog_s)

    def _shares(self, snapshot: ClusterSnapshot, workload: Workload) -> Mapping[str, float]:
        return shares(snapshot, workload.model, self.rise(workload, 0.0), workload.slo, self.bounds)

    def _settled(self, group: Group, now_s: float) -> bool:
        return group.changed_up_s is None or now_s - group.changed_up_s >= self.settle_s


def _target(group: Group, wish: int, low: int, high: int, text: str, numbers: dict[str, float]) -> ScaleRole:
    """Within the limits, which are named where they decide."""
    model, name = group.model, group.name
    turns = (levers.demand(model), levers.prompt_length(model), levers.output_length(model), levers.attainment(model))
    bounds = (levers.ttft_slo(model), levers.tpot_slo(model), levers.start_up(name), levers.least(name), levers.most(name))
    replicas = min(max(wish, low), high)
    if replicas > wish:
        text = f"min_replicas is {low}, else {wish}: {text}"
    elif replicas < wish:
        text = f"max_replicas is {high}, else {wish}: {text}"
    runner_up = "" if replicas == group.wanted else f"{group.wanted}, as it is"
    return ScaleRole(
        group=name, replicas=replicas, reason=Reason(text=text, numbers=numbers, runner_up=runner_up, levers=turns + bounds)
    )
