"""This gateway's counters, told to the controller every second: what it would otherwise have to scrape."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from cluster.metrics import Sample

log = logging.getLogger(__name__)

PUSH_S = 1.0  # The width of the controller's buckets.

Push = Callable[[float, tuple[Sample, ...]], Awaitable[None]]


async def push_samples(take: Callable[[], tuple[Sample, ...]], push: Push) -> None:
    """For ever. A push that fails is not made up for: counters tell everything again."""
    failing = False
    while True:
        try:
            async with asyncio.timeout(PUSH_S):
                await push(time.time(), take())
            failing = False
        except Exception as error:  # Whatever is wrong with Ray or the controller, the gateway serves on.
            if not failing:
                log.warning("counters reach nobody: %r", error)
            failing = True
        await asyncio.sleep(PUSH_S)
