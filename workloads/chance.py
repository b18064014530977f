"""Named streams of chance: each concern of a generator draws from its own, so that to change one leaves the others as they were."""

from __future__ import annotations

import numpy as np
import xxhash


def stream(seed: int, concern: str) -> np.random.Generator:
    """The same numbers for the same seed and concern, with one version of numpy (NEP 19 promises no more)."""
    return np.random.Generator(np.random.PCG64(xxhash.xxh3_128_intdigest(f"{seed}/{concern}".encode())))
