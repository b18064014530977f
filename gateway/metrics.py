"""The gateway's metrics, with their labels looked up once a model."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest

from cluster.errors import MobulaError
from cluster.metrics import DEMAND_NAMES, GATEWAY_METRICS, Sample, exporter, samples
from cluster.request import Request
from gateway.generation import Generation


class GatewayMetrics:
    def __init__(self, models: Iterable[str] = ()) -> None:
        """models: exported from the start, at zero, so that the first request is a rise and silence is no demand."""
        self._registry = CollectorRegistry()
        self._all = exporter(GATEWAY_METRICS, self._registry)
        self._of_model: dict[str, dict] = {}
        for model in models:
            self._model(model)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def samples(self, instance: str) -> tuple[Sample, ...]:
        """What a controller judges demand and latency by. `instance`: own host:port, as Prometheus would label what it scrapes."""
        return samples(self._registry, DEMAND_NAMES, instance=instance)

    def arrived(self, request: Request) -> None:
        row, tokens = self._model(request.model), len(request.prompt)
        row["mobula_requests_in_flight"].inc()
        row["mobula_arrivals_total"].inc()
        row["mobula_arrived_prompt_tokens_total"].inc(tokens)
        row["mobula_arrived_prompt_tokens_squared_total"].inc(tokens * tokens)

    def waiting(self, model: str, count: int) -> None:
        self._model(model)["mobula_queue_depth"].set(count)

    def rejected(self, error: MobulaError) -> None:
        """Reasons are few: the codes that this program knows, or the kind of error."""
        self._all["mobula_rejections_total"].labels(getattr(error, "code", type(error).__name__)).inc()

    def retried(self, model: str, cause: str) -> None:
        self._all["mobula_request_retries_total"].labels(model, cause).inc()

    def routed(self, model: str, seconds: float) -> None:
        self._model(model)["mobula_route_seconds"].observe(seconds)

    def gap(self, model: str, seconds: float) -> None:
        self._model(model)["mobula_itl_seconds"].observe(seconds)

    def keys_unreadable(self) -> None:
        self._all["mobula_keys_file_errors_total"].inc()

    def record_dropped(self) -> None:
        """From any thread."""
        self._all["mobula_request_log_dropped_total"].inc()

    def ended(self, generation: Generation, outcome: str) -> None:
        request, timing = generation.request, generation.timing
        row, tokens = self._model(request.model), len(generation.generated)
        row["mobula_requests_in_flight"].dec()
        row["mobula_cached_tokens_total"].inc(generation.cached_tokens or 0)
        self._all["mobula_requests_total"].labels(request.model, request.tenant, outcome).inc()
        whose = (request.model, request.tenant, generation.key_id or "anonymous")
        if generation.sent_s is not None and generation.first_choice:
            self._all["mobula_prompt_tokens_total"].labels(*whose).inc(len(request.prompt))
        self._all["mobula_output_tokens_total"].labels(*whose).inc(tokens)
        observed = {
            "mobula_ttft_seconds": timing.ttft_s,
            "mobula_tpot_seconds": timing.tpot_s,
            "mobula_e2e_seconds": timing.e2e_s,
            "mobula_queue_seconds": generation.queue_s,
            "mobula_prefill_seconds": generation.times and generation.times[1],
            "mobula_transfer_seconds": generation.times and generation.times[2],
            "mobula_decode_seconds": generation.decode_s,
            "mobula_request_prompt_tokens": len(request.prompt),
            "mobula_request_output_tokens": tokens,
        }
        for name, value in observed.items():
            if value is not None:
                row[name].observe(value)

    def _model(self, model: str) -> dict:
        row = self._of_model.get(model)
        if row is None:
            names = [metric.name for metric in GATEWAY_METRICS if metric.labels == ("model",)]
            row = self._of_model[model] = {name: self._all[name].labels(model) for name in names}
        return row
