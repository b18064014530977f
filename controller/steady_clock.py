"""Unix time that never steps back, whatever is done to the machine's clock."""

from __future__ import annotations

import time
from collections.abc import Callable


def steady_clock(not_before_s: float = 0.0) -> Callable[[], float]:
    """Seconds from now on, at the pace of the monotonic clock. not_before_s: what an earlier process has shown."""
    start_s, began_s = max(time.time(), not_before_s), time.monotonic()
    return lambda: start_s + time.monotonic() - began_s
