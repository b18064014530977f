"""What a simulation has found."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cluster.slo import Slo
from simulator.control import Act

SCHEMA = 1


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """In seconds, each to `simulator.sketch.ERROR`."""

    mean: float
    p50: float
    p90: float
    p99: float
    count: int


class ClassResult(msgspec.Struct, frozen=True, kw_only=True):
    """Of one SLO class, warm-up excluded."""

    slo: Slo
    arrived: int
    completed: int
    kept: int
    """Requests that met their whole SLO."""
    ttft_s: Quantiles | None
    tpot_s: Quantiles | None
    e2e_s: Quantiles | None


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to the fleet."""

    at_s: float
    kind: str
    what: str


class Course(msgspec.Struct, frozen=True, kw_only=True):
    """How things went: one number for each interval, in lists of equal length."""

    every_s: float
    arrivals: list[float]
    completions: list[float]
    rejections: list[float]
    kept: list[float]
    """Of those that completed in the interval, how many met their SLO."""
    output_tokens: list[float]
    in_flight: list[float]
    queued: list[float]
    """At gateways."""
    ttft_p90_s: list[float | None]
    tpot_p90_s: list[float | None]
    power_w: list[float]
    kv_share: list[float]
    """Held blocks of all there are."""
    usd_per_hour: list[float]
    replicas: dict[str, list[float]]
    """By role and phase, `decode ready`."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. The warm-up is left out but of events, decisions, the course of things, retries and transfers."""

    schema: int = SCHEMA
    workload: str
    fleet: str
    seed: int
    span_s: float
    """Simulated, from the first arrival to the last token."""
    warm_up_s: float
    arrived: int
    completed: int
    rejected: Mapping[str, int]
    """By reason."""
    kept: int
    retries: int
    """Attempts after the first."""
    preemptions: int
    transfers: int
    """KV transfers between replicas."""
    classes: Mapping[str, ClassResult]
    itl_s: Quantiles | None
    attainment: float
    """Share of requests that arrived which met their whole SLO."""
    goodput_rps: float
    """Requests within their SLO, over the time in which requests arrived."""
    output_tokens: int
    prompt_tokens: int
    cached_share: float
    """Of completed requests' prompt tokens, found in a prefix cache."""
    usd: float
    """Nodes, while they host a replica."""
    usd_per_million_output_tokens: float | None
    kwh: float
    """Of the accelerators that replicas run on."""
    kwh_per_million_output_tokens: float | None
    replica_hours: float
    utilisation: float
    """Of replicas' time, computing."""
    acts: list[Act]
    events: list[Event]
    course: Course
    warnings: list[str] = []
    interrupted: bool = False
    passes: int = 0
    cpu_s: float = 0.0
    """That the simulation took."""
    requests_per_cpu_s: float = 0.0
    peak_rss_mb: float = 0.0
