"""What Ray does in a Serve replica's process that a gateway must have otherwise, and for which Ray has no setting.

Names of Ray's private modules are replaced here and nowhere else; a release that has moved one fails at its name, before it serves.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable

from ray._private import worker as ray_worker
from ray.serve._private import replica as serve_replica


def drain_at_sigterm(drain: Callable[[], object], server: threading.Thread) -> None:
    """The first SIGTERM drains the server and then ends the process, which Serve replaces; a second ends it there and then.

    Ray's own handler does the latter at the first, through this one function. It runs on the main thread, which must not wait.
    """
    end_process = ray_worker.raise_sys_exit_with_custom_error_message
    signals = itertools.count()

    def answer(message: str, exit_code: int = 0) -> None:
        if next(signals) or not server.is_alive():
            end_process(message, exit_code)
        drain()
        threading.Thread(target=_end_after, args=(server,), daemon=True).start()

    ray_worker.raise_sys_exit_with_custom_error_message = answer


def _end_after(server: threading.Thread) -> None:
    server.join()
    os.kill(os.getpid(), signal.SIGTERM)


def stay_on_loopback() -> None:
    """Before Serve opens, on every address, a port for calls between deployments, of which there are none: in the constructor."""
    add_port = serve_replica.add_port_to_grpc_server
    serve_replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))
