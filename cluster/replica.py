"""Who serves: roles, phases, the membership table and the load reports that routers read."""

from __future__ import annotations

import enum

import msgspec

from cluster.kv import BLOCK_TOKENS, KvLayout
from cluster.performance import PerformanceModel


class Role(enum.Enum):
    """What a replica is for. A role is a set of capabilities: see `prefills` and `decodes`."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @property
    def prefills_for_others(self) -> bool:
        """Whether decode replicas may pull KV from it."""
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL


class Phase(enum.Enum):
    """Where a replica is in its life. Only READY takes new work; DRAINING finishes what it has."""

    STARTING = "starting"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    LOST = "lost"


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the membership table."""

    replica_id: str
    worker_id: str
    node: str
    endpoint: str
    """host:port of its worker's token and KV service."""
    metrics_endpoint: str = ""
    """host:port of its worker's metrics; empty where it exports none."""
    pid: int = 0
    """Of its worker's process."""
    role: Role
    phase: Phase
    model: str
    revision: str = ""
    engine: str
    accelerator: str = "cpu"
    host_id: str = ""
    """Replicas with equal, non-empty host ids can share memory."""
    performance: PerformanceModel
    layout: KvLayout | None = None
    """None where the engine moves no KV of its own (then it is prefilled where it decodes)."""
    kv_blocks: int
    block_tokens: int = BLOCK_TOKENS
    context_tokens: int
    """Longest prompt plus output, in tokens."""
    max_running: int
    """Requests in one decode batch."""
    step_budget_tokens: int
    """Prompt tokens plus decodes of one step (Sarathi-Serve's token budget)."""
    ready_since_s: float | None = None
    """Unix time at which it became READY."""


class Membership(msgspec.Struct, frozen=True, kw_only=True):
    """The whole table at one version. Versions of one registry only rise."""

    version: int
    registry: str = ""
    """Tells a registry from the one before it, whose table it does not know."""
    replicas: tuple[Replica, ...] = ()


class Load(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a replica says of itself every 200 ms."""

    replica_id: str
    sequence: int
    """Rises by one with each report; an older one is dropped."""
    at_s: float
    """Unix time at the worker."""
    phase: Phase
    running: int
    """Requests decoding."""
    waiting: int
    """Requests whose prompt is not finished, or that wait for blocks."""
    waiting_tokens: int
    """Prompt tokens still to compute."""
    kv_tokens: int
    """Tokens of context summed over decoding requests."""
    kv_blocks_used: int
    """Blocks held by requests. Cached blocks nobody holds are free."""
    step_s: float = 0.0
    """Mean duration of the latest steps; 0 before the first."""
    power_w: float = 0.0
    slowdown: float = 1.0
    """Measured over predicted time of the latest steps, each predicted by what it computed."""
    overrun_share: float = 0.0
    """Share of paced steps that took longer than the emulated time, in [0, 1]."""
