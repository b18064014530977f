"""The front door and what it is reached by: its address, keys, router, secret and certificates."""

from __future__ import annotations

import ipaddress
import ssl
from pathlib import Path

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet, GatewaySpec
from controller.config.bounds import check_at_least, check_port, check_positive
from policies.import_path import make_policy
from policies.policy import Router

TLS_FILES = ("ca.pem", "cert.pem", "key.pem")


def check_gateway(gateway: GatewaySpec, *, files: bool = True) -> None:
    """Limits, address and keys; files: those must be there."""
    for field in ("replicas", "max_queue", "max_attempts", "max_body_bytes"):
        check_at_least(getattr(gateway, field), 1, f"gateway.{field}")
    for field in ("queue_timeout_s", "silence_s"):
        check_at_least(getattr(gateway, field), 0.1, f"gateway.{field}")
    check_port(gateway.port, 1, "gateway.port")
    if gateway.keys_file and gateway.allow_anonymous:
        raise InvalidConfig("gateway.keys_file and gateway.allow_anonymous exclude each other: give one")
    if not gateway.keys_file and not gateway.allow_anonymous:
        raise InvalidConfig("gateway.keys_file is missing; to serve without keys, set gateway.allow_anonymous: true")
    if files and gateway.keys_file and not Path(gateway.keys_file).is_file():
        raise InvalidConfig(f"gateway.keys_file {gateway.keys_file} is no file")


def router_of(fleet: Fleet) -> Router:
    """Raises InvalidConfig for one that cannot be imported or set."""
    return make_policy(fleet.routing.use, fleet.routing.settings, place="routing", kind=Router)


def check_transport(fleet: Fleet, *, files: bool = True) -> None:
    """Secret and certificates load, if files are asked for, and without certificates nobody else can listen."""
    transport = fleet.transport
    if transport.kv_bytes_per_s is not None:
        check_positive(transport.kv_bytes_per_s, "transport.kv_bytes_per_s")
    if files and transport.secret_file is not None:
        _check_secret(Path(transport.secret_file))
    if transport.tls_dir is not None:
        if not files:
            return
        for name in TLS_FILES:
            if not (Path(transport.tls_dir) / name).is_file():
                raise InvalidConfig(f"transport.tls_dir {transport.tls_dir} lacks {name}; it needs {', '.join(TLS_FILES)}")
        _check_certificates(Path(transport.tls_dir))
    elif not _is_loopback(fleet.gateway.host):
        raise InvalidConfig(
            f"gateway.host {fleet.gateway.host} is no loopback address and transport.tls_dir is missing: "
            "without TLS everything stays on 127.0.0.1"
        )


def _check_secret(file: Path) -> None:
    if not file.is_file():
        raise InvalidConfig(f"transport.secret_file {file} is no file")
    try:
        secret = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"transport.secret_file {file} cannot be read: {error}") from error
    if not secret:
        raise InvalidConfig(f"transport.secret_file {file} is empty")


def _check_certificates(directory: Path) -> None:
    context = ssl.create_default_context()
    authority, certificate, key = (directory / name for name in TLS_FILES)
    try:
        context.load_verify_locations(authority)
        context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else str(error)
        raise InvalidConfig(f"transport.tls_dir {directory}: {', '.join(TLS_FILES)} do not load: {reason}") from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
