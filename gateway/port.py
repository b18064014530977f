"""The port of the gateway, which replicas of one fleet share on a host, and no two fleets: the kernel would split their clients."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterable

from cluster.errors import InvalidConfig

SIBLING_S = 15.0  # A replica that began to listen a moment ago has told the controller by then, on a busy machine too.
RETRY_S = 0.1


def refuse_strangers(host: str, port: int, siblings: Callable[[], Iterable[str]]) -> None:
    """Raise InvalidConfig unless nobody listens there, or a gateway replica of this fleet runs on this host. Blocks.

    siblings: own addresses of this fleet's replicas, on whichever host.
    """
    deadline_s = time.monotonic() + SIBLING_S
    while _taken(host, port) and not any(_taken(*_parts(address)) for address in siblings()):
        if time.monotonic() >= deadline_s:
            raise InvalidConfig(f"gateway.port {port} on {host} is taken by another program")
        time.sleep(RETRY_S)


def _taken(host: str, port: int) -> bool:
    """Whether somebody listens there, willing to share or not."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
