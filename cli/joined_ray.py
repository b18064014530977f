"""Somebody else's Ray: connected to for a while, and left as it was."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from cluster.errors import Unreachable

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Else Ray takes 127.0.0.1 for a mistake and looks for a reachable address.
}
"""Of whoever starts or joins a Ray."""


@contextlib.contextmanager
def joined_ray(address: str) -> Iterator[None]:
    """Connected to it. Raises Unreachable."""
    os.environ.update(ENVIRONMENT)
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError) as error:
        hint = "RAY_AUTH_MODE and RAY_AUTH_TOKEN must be here what they were for `ray start`"
        raise Unreachable(f"no Ray can be joined at {address}: {' '.join(str(error).split())}; {hint}") from error
    try:
        yield
    finally:
        ray.shutdown()
