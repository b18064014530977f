"""How two ends come to trust each other: gRPC channels, TLS, the shared secret and the version; and what a gRPC status means.

A caller names itself in metadata; the server answers with its version before anything else, so each side can refuse the other.
"""

from __future__ import annotations

import hmac
import ipaddress
from pathlib import Path

import grpc
import grpc.aio

from cluster.errors import InvalidConfig, MobulaError, NotAllowed, ProtocolMismatch, Unreachable
from transports.messages import MAX_MESSAGE_BYTES, PROTOCOL_VERSION
from transports.transport import Credential

SILENCE_S = 5.0  # A peer that owes a sign of life and gave none for so long is gone.
ALIVE_S = 1.0  # Several may be late before the peer is given up.
MAX_GATEWAY_ID_CHARS = 256
LOOKAHEAD_BYTES = 8 * 2**20  # HTTP/2 window of a stream to start from: a few KV frames.

VERSION = "mobula-version"
SECRET = "mobula-secret-bin"
GATEWAY = "mobula-gateway-bin"

# A ping goes out after 1.5 s of silence and has 2.5 s to be answered, which makes 4 of SILENCE_S. While the bandwidth
# estimator's ping is out gRPC sends no keepalive ping, so that one needs the same limit.
_ALIVE_OPTIONS = [
    ("grpc.keepalive_time_ms", 1500),
    ("grpc.keepalive_timeout_ms", 2500),
    ("grpc.http2.ping_timeout_ms", 2500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.lookahead_bytes", LOOKAHEAD_BYTES),
]
SERVER_OPTIONS = [*_ALIVE_OPTIONS, ("grpc.so_reuseport", 0)]
# A pool shared between channels would share connections, and so their queues, too.
CHANNEL_OPTIONS = [
    *_ALIVE_OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]


def open_channel(endpoint: str, credential: Credential) -> grpc.aio.Channel:
    """Raises InvalidConfig for plain text beyond this machine."""
    if credential.tls_dir is None:
        require_loopback(endpoint.rpartition(":")[0])
        return grpc.aio.insecure_channel(endpoint, options=CHANNEL_OPTIONS)
    ca, cert, key = read_tls(credential.tls_dir)
    return grpc.aio.secure_channel(endpoint, grpc.ssl_channel_credentials(ca, key, cert), options=CHANNEL_OPTIONS)


def bind(server: grpc.aio.Server, host: str, port: int, credential: Credential) -> int:
    """The port that was bound. Raises InvalidConfig."""
    if credential.tls_dir is None:
        require_loopback(host)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if credential.tls_dir is None:
            return server.add_insecure_port(address)
        ca, cert, key = read_tls(credential.tls_dir)
        return server.add_secure_port(address, grpc.ssl_server_credentials([(key, cert)], ca, require_client_auth=True))
    except RuntimeError as error:
        raise InvalidConfig(f"cannot listen on {address}: {error}") from error


def read_tls(tls_dir: str) -> tuple[bytes, bytes, bytes]:
    """Authority, certificate and key, as PEM."""
    try:
        ca, cert, key = (Path(tls_dir, name).read_bytes() for name in ("ca.pem", "cert.pem", "key.pem"))
    except OSError as error:
        raise InvalidConfig(f"TLS files of {tls_dir}: {error}") from error
    return ca, cert, key


def require_loopback(host: str) -> None:
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise InvalidConfig(f"plain text to {host!r}, which is not a loopback address: give tls_dir")


def introduce(credential: Credential, gateway_id: str = "") -> tuple[tuple[str, str | bytes], ...]:
    """A caller's metadata."""
    return (VERSION, str(PROTOCOL_VERSION)), (SECRET, credential.secret.encode()), (GATEWAY, gateway_id.encode())


async def admit(context: grpc.aio.ServicerContext, credential: Credential) -> str:
    """Check a caller's metadata and answer with ours. Returns the gateway's id; ends the call where it is refused."""
    said = dict(context.invocation_metadata())
    if not hmac.compare_digest(said.get(SECRET, b""), credential.secret.encode()):
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the shared secret is missing or wrong")
    if said.get(VERSION) != str(PROTOCOL_VERSION):
        await refuse(context, ProtocolMismatch(f"protocol version {said.get(VERSION)} called, {PROTOCOL_VERSION} answers"))
    gateway_id = said.get(GATEWAY, b"").decode(errors="replace")
    if len(gateway_id) > MAX_GATEWAY_ID_CHARS:
        await refuse(context, ProtocolMismatch(f"gateway id of {len(gateway_id)} characters above {MAX_GATEWAY_ID_CHARS}"))
    await context.send_initial_metadata(((VERSION, str(PROTOCOL_VERSION)),))
    return gateway_id


async def refuse(context: grpc.aio.ServicerContext, error: ProtocolMismatch) -> None:
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))


async def check_answer(call: grpc.aio.UnaryStreamCall | grpc.aio.StreamStreamCall, endpoint: str) -> None:
    """Wait for the server's word and refuse one of another version. Raises AioRpcError where it has refused us."""
    answered = (await call.initial_metadata() or {}).get(VERSION)
    if answered is None:
        await call.read()
    if answered != str(PROTOCOL_VERSION):
        raise ProtocolMismatch(f"protocol version {answered} answers at {endpoint}, {PROTOCOL_VERSION} called")


def meaning(error: grpc.aio.AioRpcError, endpoint: str) -> MobulaError:
    """What a call's failure is to the caller."""
    text = f"{endpoint}: {error.details()}"
    match error.code():
        case grpc.StatusCode.UNAUTHENTICATED:
            return NotAllowed(text)
        case grpc.StatusCode.FAILED_PRECONDITION | grpc.StatusCode.UNIMPLEMENTED:
            return ProtocolMismatch(text)
        case code:
            return Unreachable(f"{text} ({code.name})")
