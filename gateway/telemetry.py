"""This gateway's counters, told to the controller every second: what it would otherwise have to scrape."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from cluster.metrics import Sample

log = logging.getLogger(__name__)

PUSH_S = 1.0  # The width of the controller's buckets.
PUSH_TIMEOUT_S = 5.0  # A push that takes longer is given up: there is never more than one under way.

Push = Callable[[float, tuple[Sample, ...]], Awaitable[None]]
"""Tells the controller samples, all taken at a Unix time."""


async def push_samples(take: Callable[[], tuple[Sample, ...]], push: Push) -> None:
    """For ever. A push that fails is not made up for: the next one says as much, since counters are sums."""
    failing = False
    while True:
        try:
            # Whole milliseconds, which is how finely Prometheus tells time.
            await asyncio.wait_for(push(round(time.time(), 3), take()), PUSH_TIMEOUT_S)
        except Exception as error:  # Whatever is wrong with Ray or the controller, the gateway serves on.
            if not failing:
                log.warning("counters reach no controller: %r", error)
            failing = True
        else:
            if failing:
                log.warning("counters reach the controller again")
            failing = False
        await asyncio.sleep(PUSH_S)
