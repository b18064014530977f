"""The controller: its policies, guards and challengers, what they say about this fleet, and where telemetry is read."""

from __future__ import annotations

import urllib.parse

from cluster.errors import InvalidConfig
from cluster.fleet import ControlSpec, Fleet, PipelineSpec, TelemetrySpec
from controller.config.bounds import check_at_least, check_name, check_port
from controller.observe.assemble import BUCKET_S, BUCKETS
from controller.pipelines import build
from policies.flow import Window
from policies.policy import Policy

MIN_JOURNAL_BYTES = 16 * 2**20  # Some minutes of a thousand replicas: below that a pass is pruned before anyone can ask why.


def check_control(fleet: Fleet) -> None:
    """What decides can be made; port and journal are within their bounds."""
    control = fleet.control
    for place, spec in pipelines_of(control).items():
        _check_pipeline(spec, place)
    for name in control.challengers:
        check_name(name, "control.challengers: the name")
    check_port(control.http_port, 0, "control.http_port")
    if control.http_port == fleet.gateway.port:
        raise InvalidConfig(f"control.http_port {control.http_port} is gateway.port, too; they must differ")
    check_at_least(control.journal_bytes, MIN_JOURNAL_BYTES, "control.journal_bytes")


def pipelines_of(control: ControlSpec) -> dict[str, PipelineSpec]:
    """All that decide, by their place in the file."""
    challengers = {f"control.challengers.{name}": spec for name, spec in control.challengers.items()}
    return {"control.pipeline": control.pipeline, **challengers}


def check_telemetry(telemetry: TelemetrySpec) -> None:
    """At most one Prometheus, at a URL."""
    url = telemetry.prometheus_url
    if url is None:
        return
    if telemetry.local_prometheus:
        raise InvalidConfig(f"telemetry.local_prometheus and telemetry.prometheus_url {url} exclude each other: give one")
    try:
        parts = urllib.parse.urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise InvalidConfig(f"telemetry.prometheus_url {url!r} is no http:// or https:// URL with a host")


def _check_pipeline(spec: PipelineSpec, place: str) -> None:
    for index, policy in enumerate(build(spec, place).policies):
        _check_windows(policy, f"{place}.policies[{index}].settings")


def _check_windows(policy: Policy, place: str) -> None:
    """A policy that looks back further than telemetry goes would wait for ever."""
    kept_s = BUCKETS * BUCKET_S
    window = getattr(policy, "window", None)
    if isinstance(window, Window) and window.fall_s > kept_s:
        raise InvalidConfig(f"{place}.window.fall_s {window.fall_s} is above {kept_s}, the seconds of demand that are kept")
