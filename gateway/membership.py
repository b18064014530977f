"""The membership table, as the registry tells it. Without the registry the last copy stays in force."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import msgspec
import ray
from ray.exceptions import RayError

from cluster.placement import CONTROLLER_NAME
from cluster.replica import Membership

logger = logging.getLogger(__name__)

POLL_S = 10.0
GRACE_S = 5.0  # Beyond POLL_S the registry is taken for gone.
RETRY_S = 1.0
SETTLE_S = 5.0  # Five heartbeats, by which every worker that lives has registered with a new registry.


def known_gateways(namespace: str) -> tuple[str, ...]:
    """Own addresses of the gateway replicas that the registry has heard of late; none without a registry. Blocks."""
    try:
        found: tuple[str, ...] = ray.get(ray.get_actor(CONTROLLER_NAME, namespace).gateways.remote(), timeout=GRACE_S)
    except (ValueError, RayError):
        return ()
    return found


async def follow_registry(namespace: str, address: str) -> AsyncIterator[Membership]:
    """Every table that differs from the one before, for ever. `address`: this gateway replica's own, told to the registry."""
    handle, last = None, None
    while True:
        try:
            handle = handle or await asyncio.to_thread(ray.get_actor, CONTROLLER_NAME, namespace)
            after = -1 if last is None else last.version
            table = await asyncio.wait_for(handle.membership.remote(after, POLL_S, address), POLL_S + GRACE_S)
        except Exception as error:  # Whatever is wrong with Ray or the registry, the gateway serves on.
            logger.warning("registry %s in %s: %r; again in %.0f s", CONTROLLER_NAME, namespace, error, RETRY_S)
            handle = None
            await asyncio.sleep(RETRY_S)
            continue
        if last is not None and table.registry != last.registry:
            logger.warning("registry %s in %s is another; the last table holds for %.0f s", CONTROLLER_NAME, namespace, SETTLE_S)
            last = msgspec.structs.replace(last, version=-1, registry=table.registry)
            await asyncio.sleep(SETTLE_S)
        elif table != last:
            last = table
            yield table
