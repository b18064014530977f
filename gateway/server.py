"""Serving the application: its own socket, which gateway replicas on one host share, and a drain with a bound."""

from __future__ import annotations

import socket
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from cluster.errors import InvalidConfig
from cluster.fleet import GatewaySpec

BACKLOG = 2048
DRAIN_S = 30.0  # Streams that last longer at SIGTERM are cut.
KEEP_ALIVE_S = 75


def listen(host: str, port: int) -> socket.socket:
    """Port 0 takes a free one. Raises InvalidConfig where the port is taken by somebody who does not share it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise InvalidConfig(f"gateway {host}:{port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def address_of(listener: socket.socket) -> str:
    """host:port as a URL has it."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class GatewayServer(uvicorn.Server):
    """SIGTERM, SIGINT and `drain` stop accepting, finish what streams, then end `serve`."""

    def __init__(
        self,
        app: FastAPI,
        spec: GatewaySpec,
        *,
        own: socket.socket | None = None,
        tls_dir: str | None = None,
        drain_s: float = DRAIN_S,
    ) -> None:
        """own: another listener, that this replica shares with nobody. `tls_dir`: HTTPS with its certificate; none is asked."""
        config = uvicorn.Config(
            app,
            http="httptools",
            loop="uvloop",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(drain_s),
            ssl_certfile=None if tls_dir is None else Path(tls_dir, "cert.pem"),
            ssl_keyfile=None if tls_dir is None else Path(tls_dir, "key.pem"),
        )
        try:
            config.load()
        except OSError as error:
            raise InvalidConfig(f"transport.tls_dir {tls_dir}: cert.pem and key.pem do not load: {error.strerror}") from error
        super().__init__(config)
        self._gateway = app.state.gateway
        self._shared = listen(spec.host, spec.port)
        self._listeners = [self._shared] if own is None else [self._shared, own]

    @property
    def port(self) -> int:
        return self._shared.getsockname()[1]

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await super().serve(sockets=sockets or self._listeners)

    def drain(self) -> None:
        """Loop thread only."""
        self._refuse_new()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: object) -> None:
        super().handle_exit(sig, frame)
        self._refuse_new()

    def _refuse_new(self) -> None:
        if self._gateway.dispatcher is not None:  # Else it has not begun to serve.
            self._gateway.dispatcher.draining = True
