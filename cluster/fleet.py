"""What the operator asks for: the types of cluster.yaml. `controller/config/` reads and checks it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from cluster.kv import BLOCK_TOKENS
from cluster.node import Market
from cluster.replica import Role
from cluster.schedule import Schedule
from cluster.slo import Slo


class _Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all: unknown keys are errors."""


class ModelSpec(_Spec, frozen=True, kw_only=True):
    """A model to serve."""

    name: str
    """As clients name it."""
    path: str
    """A directory with config, safetensors and tokenizer, or a hub name."""
    revision: str = ""


class NodeSpec(_Spec, frozen=True, kw_only=True):
    """A machine. With a local Ray each becomes a raylet with these labels; with --address it is matched by label."""

    name: str
    pool: str = "default"
    accelerator: str = "cpu"
    """A name in `cluster.hardware`."""
    cpus: float = 2.0
    slots: int | None = None
    """Replicas it can host: on a machine with accelerators, as many as fit on them. None: its even share of what its pool's groups
    may have at most."""
    market: Market = Market.ON_DEMAND
    zone: str = ""
    power_domain: str = ""
    """What it shares a power budget with."""
    price_usd_per_hour: float = 0.0


class Pace(_Spec, frozen=True, kw_only=True):
    """Behave as another machine: each step lasts at least as long as there."""

    shape: str
    """A name in `cluster.models`."""
    accelerator: str
    """A name in `cluster.hardware`."""
    tensor_parallel: int = 1
    speedup: float = 1.0
    """Emulated time divided by this, > 0, so that a slow machine's shape can be shown in a short demo."""


class ReplicaGroup(_Spec, frozen=True, kw_only=True):
    """Replicas of one kind."""

    role: Role
    count: int = 1
    """How many are started."""
    min_replicas: int | None = None
    """The controller never goes below; None is `count`."""
    max_replicas: int | None = None
    """The controller never goes above; None is `count`."""
    schedules: tuple[Schedule, ...] = ()
    """Narrower limits for parts of the week. One later in the list goes before an earlier one."""
    startup_s: float = 60.0
    """Start to READY, believed until one was measured: a minute loads 8B weights from a local disk."""
    start_timeout_s: float = 900.0
    """A start that takes longer has failed: a big checkpoint from a slow disk, or from the hub."""
    model: str = ""
    """Name of a model; may be left out with a single model."""
    engine: Literal["torch", "emulated"] = "torch"
    pool: str = "default"
    """Node pool whose nodes host them, in turn."""
    per_worker: int = 1
    """Replicas in one worker process. More than 1 only for emulated ones."""
    pace: Pace | None = None
    """None runs as fast as the machine can; required by the emulated engine."""
    kv_blocks: int = 2048
    """KV blocks of `block_tokens` tokens."""
    block_tokens: int = BLOCK_TOKENS
    max_running: int = 64
    """Requests in one decode batch."""
    step_budget_tokens: int = 512
    """Prompt tokens plus decodes in one step. 512 costs at most a quarter of prefill speed (Sarathi-Serve, section 5)."""
    threads: int = 1
    """Torch threads of a worker."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class GatewaySpec(_Spec, frozen=True, kw_only=True):
    """The front door."""

    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    keys_file: str | None = None
    """File of hashed API keys. Changes take effect within a second; one that cannot be read leaves the keys as they were."""
    allow_anonymous: bool = False
    """Serve without keys. One of the two must be given."""
    max_queue: int = 256
    """Requests that may wait for a replica with room; beyond that 429."""
    queue_timeout_s: float = 30.0
    """A request that waited so long gets 429."""
    max_attempts: int = 4
    """Replicas tried for one request in a row, each without a further token; the first included."""
    silence_s: float = 2.0
    """A worker from which nothing came for so long is taken for hung: ten load reports missed."""
    request_log: str | None = None
    """Directory of the request log; None writes none."""
    max_body_bytes: int = 16 * 2**20


class RoutingSpec(_Spec, frozen=True, kw_only=True):
    """How replicas are chosen: a Router class by import path, and its fields."""

    use: str = "policies.routing:PredictedLatencyRouter"
    settings: dict[str, float] = {}


class PolicySpec(_Spec, frozen=True, kw_only=True):
    """A policy or guard: a class by import path, and its fields."""

    use: str
    settings: dict[str, Any] = {}


class PipelineSpec(_Spec, frozen=True, kw_only=True):
    """How is decided. The order is as given, but that emergency policies go first."""

    policies: tuple[PolicySpec, ...] = (
        PolicySpec(use="policies.hands:Hands"),
        PolicySpec(use="policies.disaggregation:Disaggregation"),
        PolicySpec(use="policies.scaling:Scaling"),
    )
    guards: tuple[PolicySpec, ...] = (
        PolicySpec(use="policies.guards:Paused"),
        PolicySpec(use="policies.guards:StaleTelemetry"),
        PolicySpec(use="policies.guards:RateOfChange"),
        PolicySpec(use="policies.guards:DisruptionBudget"),
        PolicySpec(use="policies.guards:Capacity"),
    )
    expansion: dict[str, Any] = {}
    """Fields of `policies.expansion.Expansion`."""


class ControlSpec(_Spec, frozen=True, kw_only=True):
    """The controller."""

    mode: Literal["act", "advise"] = "act"
    """advise: once the fleet is up, decide and write down, and do nothing."""
    pipeline: PipelineSpec = PipelineSpec()
    challengers: dict[str, PipelineSpec] = {}
    """Decide in shadow on the same snapshots, for `mobula compare`."""
    http_port: int = 0
    """Of its own metrics and of Prometheus' service discovery; 0 takes a free one, which `mobula status --json` names."""
    journal_bytes: int = 2 * 2**30
    """The oldest passes go once the journal is larger. Two days and more of a thousand replicas."""


class TelemetrySpec(_Spec, frozen=True, kw_only=True):
    """Where demand and latency are read."""

    prometheus_url: str | None = None
    """None: from the counters that gateways tell the controller."""
    local_prometheus: bool = False
    """Start a Prometheus server (`prometheus` on the PATH) beside a local fleet, and read from it."""


class TransportSpec(_Spec, frozen=True, kw_only=True):
    """How bytes move."""

    kv: Literal["auto", "grpc", "shared_memory"] = "auto"
    """auto: shared memory between workers on one host, gRPC otherwise."""
    kv_bytes_per_s: float | None = None
    """Throttles KV sending, to try a slow link; None does not."""
    secret_file: str | None = None
    """Shared secret of gateway and workers; None makes a fresh one per start of a local cluster."""
    tls_dir: str | None = None
    """Directory with ca.pem, cert.pem and key.pem; None speaks plain text, which only loopback addresses may.

    Between gateway and workers it is mutual; clients of the gateway, who have API keys, need no certificate.
    """


class Fleet(_Spec, frozen=True, kw_only=True):
    """A whole cluster.yaml."""

    name: str = "mobula"
    models: tuple[ModelSpec, ...]
    nodes: tuple[NodeSpec, ...] = (NodeSpec(name="local"),)
    replicas: tuple[ReplicaGroup, ...]
    gateway: GatewaySpec = GatewaySpec()
    routing: RoutingSpec = RoutingSpec()
    transport: TransportSpec = TransportSpec()
    control: ControlSpec = ControlSpec()
    telemetry: TelemetrySpec = TelemetrySpec()
    slo: dict[str, Slo] = msgspec.field(default_factory=lambda: {"default": Slo(ttft_s=1.0, tpot_s=0.1)})
    """Bounds by SLO class."""

    @property
    def scheme(self) -> Literal["http", "https"]:
        """Of the gateway's URLs."""
        return "http" if self.transport.tls_dir is None else "https"
