"""Every metric Mobula exports, in one table. Exporters are made from it, so a name, unit or label is written once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS = tuple(float(2**power) for power in range(18))


class Metric(msgspec.Struct, frozen=True):
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = LATENCY_BUCKETS_S


GATEWAY_METRICS = (
    Metric("mobula_arrivals_total", "counter", "Requests that arrived, refused ones among them.", ("model",)),
    Metric("mobula_arrived_prompt_tokens_total", "counter", "Prompt tokens of requests that arrived.", ("model",)),
    Metric("mobula_arrived_prompt_tokens_squared_total", "counter", "Sum of their squared prompt lengths.", ("model",)),
    Metric("mobula_requests_total", "counter", "Requests that ended, by how.", ("model", "tenant", "outcome")),
    Metric("mobula_rejections_total", "counter", "Requests refused before they ran, by reason.", ("reason",)),
    Metric("mobula_request_retries_total", "counter", "Attempts after the first, by cause.", ("model", "cause")),
    Metric("mobula_prompt_tokens_total", "counter", "Prompt tokens of requests that ended.", ("model", "tenant", "key")),
    Metric("mobula_output_tokens_total", "counter", "Tokens sent to clients.", ("model", "tenant", "key")),
    Metric("mobula_cached_tokens_total", "counter", "Prompt tokens found in a prefix cache.", ("model",)),
    Metric("mobula_requests_in_flight", "gauge", "Requests accepted and not ended.", ("model",)),
    Metric("mobula_queue_depth", "gauge", "Requests that wait for a replica with room.", ("model",)),
    Metric("mobula_ttft_seconds", "histogram", "Arrival to first token, at the gateway.", ("model",)),
    Metric("mobula_tpot_seconds", "histogram", "Mean time per token after the first, at the gateway.", ("model",)),
    Metric("mobula_itl_seconds", "histogram", "Gap between two tokens, at the gateway.", ("model",)),
    Metric("mobula_e2e_seconds", "histogram", "Arrival to last token, at the gateway.", ("model",)),
    Metric("mobula_queue_seconds", "histogram", "Wait before prefill, gateway and replica.", ("model",)),
    Metric("mobula_prefill_seconds", "histogram", "Prompt computation.", ("model",)),
    Metric("mobula_transfer_seconds", "histogram", "KV transfer not hidden behind prefill.", ("model",)),
    Metric("mobula_decode_seconds", "histogram", "First to last token.", ("model",)),
    Metric(
        "mobula_route_seconds",
        "histogram",
        "Choosing replicas for one request, hashing apart.",
        ("model",),
        (1e-5, 2e-5, 4e-5, 1e-4, 2e-4, 4e-4, 1e-3, 1e-2),
    ),
    Metric("mobula_keys_file_errors_total", "counter", "Changes of the keys file that could not be read."),
    Metric("mobula_request_log_dropped_total", "counter", "Request records that could not be written."),
    Metric("mobula_request_prompt_tokens", "histogram", "Prompt lengths.", ("model",), TOKEN_BUCKETS),
    Metric("mobula_request_output_tokens", "histogram", "Output lengths.", ("model",), TOKEN_BUCKETS),
)

# The gateway's samples by which a controller judges demand and latency, as they are exported.
ARRIVALS = "mobula_arrivals_total"
ARRIVED_TOKENS = "mobula_arrived_prompt_tokens_total"
ARRIVED_TOKENS_SQUARED = "mobula_arrived_prompt_tokens_squared_total"
PROMPT_TOKENS = "mobula_request_prompt_tokens_sum"
CACHED_TOKENS = "mobula_cached_tokens_total"
OUTPUT_TOKENS = "mobula_request_output_tokens_sum"
REQUESTS = "mobula_request_output_tokens_count"
TTFT = "mobula_ttft_seconds_bucket"
TPOT = "mobula_tpot_seconds_bucket"
QUEUED = "mobula_queue_depth"
IN_FLIGHT = "mobula_requests_in_flight"
DEMAND_NAMES = (
    ARRIVALS,
    ARRIVED_TOKENS,
    ARRIVED_TOKENS_SQUARED,
    PROMPT_TOKENS,
    CACHED_TOKENS,
    OUTPUT_TOKENS,
    REQUESTS,
    TTFT,
    TPOT,
    QUEUED,
    IN_FLIGHT,
)
"""What a controller reads of demand and latency. All of them by model alone: their number does not grow with tenants and keys."""

REPLICA_METRICS = (
    Metric("mobula_replica_running", "gauge", "Requests decoding.", ("replica", "role")),
    Metric("mobula_replica_waiting", "gauge", "Requests whose prompt is not finished.", ("replica", "role")),
    Metric("mobula_replica_kv_blocks_used", "gauge", "KV blocks held by requests.", ("replica", "role")),
    Metric("mobula_replica_kv_blocks_cached", "gauge", "KV blocks nobody holds and others may share.", ("replica", "role")),
    Metric("mobula_replica_kv_blocks", "gauge", "KV blocks in the pool.", ("replica", "role")),
    Metric("mobula_replica_power_watts", "gauge", "Power drawn or emulated.", ("replica", "role")),
    Metric("mobula_replica_steps_total", "counter", "Engine steps.", ("replica", "role")),
    Metric(
        "mobula_replica_overrun_steps_total",
        "counter",
        "Paced steps longer than emulated; where all is emulated, those a whole step late.",
        ("replica", "role"),
    ),
    Metric("mobula_replica_prompt_tokens_total", "counter", "Prompt tokens computed.", ("replica", "role")),
    Metric("mobula_replica_cached_tokens_total", "counter", "Prompt tokens found cached.", ("replica", "role")),
    Metric("mobula_replica_output_tokens_total", "counter", "Tokens generated.", ("replica", "role")),
    Metric("mobula_replica_preemptions_total", "counter", "Requests put back for want of blocks.", ("replica", "role")),
    Metric("mobula_replica_transfers_total", "counter", "KV transfers received, by outcome.", ("replica", "role", "outcome")),
    Metric("mobula_replica_transfer_bytes_total", "counter", "KV bytes received.", ("replica", "role")),
)


CONTROLLER_METRICS = (
    Metric("mobula_controller_epoch", "gauge", "Of the controller in charge: above that of every one before it."),
    Metric("mobula_controller_passes_total", "counter", "Passes that looked at the cluster."),
    Metric("mobula_controller_pass_seconds", "histogram", "One pass: observe, decide, write down, begin to act."),
    Metric("mobula_controller_failures_total", "counter", "Passes that did nothing, as something was raised."),
    Metric("mobula_controller_unwritten_total", "counter", "Passes that the journal did not take."),
    Metric("mobula_controller_journal_bytes", "gauge", "The journal on disk."),
    Metric("mobula_controller_actions_total", "counter", "Actions decided, by kind.", ("kind",)),
    Metric("mobula_controller_dropped_total", "counter", "Actions proposed and dropped, by the policy or guard.", ("by",)),
    Metric("mobula_controller_holds", "gauge", "Operators' pauses, cordons, drains and pins in force.", ("kind",)),
    Metric("mobula_controller_telemetry_age_seconds", "gauge", "Age of what is known of a model's demand.", ("model",)),
    Metric("mobula_controller_telemetry_errors_total", "counter", "Times that telemetry could not be read."),
    Metric("mobula_controller_samples_refused_total", "counter", "Samples too late, too many, or no count."),
    Metric("mobula_controller_loads_refused_total", "counter", "Load reports that could not be."),
    Metric("mobula_controller_heartbeats_lost_total", "counter", "Workers taken for dead as they fell silent."),
    Metric("mobula_replicas_wanted", "gauge", "The target in force.", ("group",)),
    Metric("mobula_replicas", "gauge", "Replicas there are.", ("group", "phase")),
    Metric("mobula_nodes", "gauge", "Machines of the config, by whether they are up.", ("alive",)),
    Metric("mobula_price_usd_per_hour", "gauge", "Of the machines that are up."),
)


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One exported number at one time, named as Prometheus' text format names it."""

    name: str
    labels: tuple[tuple[str, str], ...]
    """By name, in order."""
    value: float


_KINDS = {"counter": Counter, "gauge": Gauge}


def exporter(metrics: Iterable[Metric], registry: CollectorRegistry) -> Mapping[str, Counter | Gauge | Histogram]:
    """The table's rows as live collectors on a registry, by name."""
    made: dict[str, Counter | Gauge | Histogram] = {}
    for metric in metrics:
        if metric.kind == "histogram":
            made[metric.name] = Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=registry)
        else:
            made[metric.name] = _KINDS[metric.kind](metric.name, metric.help, metric.labels, registry=registry)
    return made


def samples(registry: CollectorRegistry, names: Iterable[str], **labels: str) -> tuple[Sample, ...]:
    """What a registry exports under these names just now, with more labels, in order.

    Labels without a value are left out, as Prometheus does.
    """
    found = []
    for family in registry.restricted_registry(names).collect():
        for one in family.samples:
            pairs = {**one.labels, **labels}.items()
            found.append(Sample(one.name, tuple(sorted((label, value) for label, value in pairs if value)), float(one.value)))
    return tuple(sorted(found, key=lambda sample: (sample.name, sample.labels)))
