"""How the simulated world differs from what policies believe of it: true step times, delays, losses, and what breaks.

By default it does differ: step times are the measured ones where the policies believe a roofline, no two replicas are equally
fast, and news takes as long as it does live. `World.ideal()` is the world as the policies believe it.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from cluster.kv import KvLayout

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that happens to the fleet at a time."""

    at_s: Seconds
    kind: Literal["kill", "hang", "slow", "lose_node", "take_spot", "lose_telemetry"]
    """kill: a replica's process ends. hang: it stands still. slow: every step lasts `factor` times as long. lose_node: a machine is
    gone. take_spot: the same after a notice of `notice_s`. lose_telemetry: no load report and no counter reaches anybody."""
    target: str = ""
    """A replica, or a node; for slow either. Empty: one that is drawn."""
    lasts_s: Seconds | None = None
    """Until a node is back, a slow one well again, telemetry there again; None is for ever."""
    factor: Annotated[float, msgspec.Meta(gt=0)] = 3.0
    notice_s: Seconds = 30.0


class World(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of a simulation that a cluster.yaml does not have."""

    step_times: Literal["measured", "believed"] = "measured"
    """measured: `cluster.measured.table_for` each group's pace. believed: as the policies believe."""
    tables: dict[str, str] = {}
    """Step tables by group (`decode`, or `model/role/pool`), files that `mobula calibrate` wrote. They go before `step_times`."""
    layouts: dict[str, KvLayout] = {}
    """KV by group, where it is not that of the pace's shape: a paced replica steps as slowly as that model and moves its own KV."""
    replica_speed_sd: Share = 0.03
    """Standard deviation of the logarithm of replicas' step times: chips of one kind differ by some percent."""
    startup_sd: Share = 0.15
    """The same of start-up times."""
    start_failure_share: Share = 0.0
    hop_s: Seconds = 0.0015
    """Client to engine, and back: half of the 3.0 ms that a gateway added to TTFT (`benchmarks.gateway`, 2 cores)."""
    report_every_s: Annotated[float, msgspec.Meta(gt=0)] = 0.2
    report_delay_s: Seconds = 0.01
    counters_delay_s: Seconds = 0.5
    """Of gateways' counters on their way to the controller, which they are sent to each second."""
    report_loss_share: Share = 0.0
    link_bytes_per_s: Annotated[float, msgspec.Meta(gt=0)] = 25e9 / 8
    """Of each node, each way. 25 Gbit/s, as DistServe's testbed has between nodes (OSDI'24, section 6.1)."""
    transfer_setup_s: Seconds = 0.012
    """Of a KV transfer beside its bytes: as measured, see `policies.routing`."""
    role_change_s: Seconds = 1.0
    """Weights stay: 0.9 s were measured live."""
    faults: tuple[Fault, ...] = ()
    replica_mtbf_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """Mean time between a replica's failures, exponential; None never."""
    spot_mtbf_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    """The same of a node of the spot market, taken away with `spot_notice_s` of warning, and back after `spot_gone_s`."""
    spot_notice_s: Seconds = 120.0
    """AWS gives two minutes; GCP and Azure 30 s."""
    spot_gone_s: Seconds = 1800.0
    spot_traces: dict[str, str] = {}
    """Zone to a file of how many nodes there were to be had, as in SkyPilot's spot-traces: spot nodes of the zone beyond it are
    taken, the newest in the file's order first."""

    @classmethod
    def ideal(cls) -> World:
        """As the policies believe, without delay, loss or chance."""
        return cls(
            step_times="believed", replica_speed_sd=0.0, startup_sd=0.0, hop_s=0.0, report_delay_s=0.0, counters_delay_s=0.0
        )  # fmt: skip
