"""Mean time to the first token of a prefill engine as an M/D/1 queue, for one device and for two, split either way.

DistServe (OSDI'24), section 3.1, equations 1 to 3. They hold for Poisson arrivals of prompts that all take equally long and are
computed one at a time; the two-way forms further for stages that take exactly half each, and for a speed-up that is the same for
every prompt. Prompts of unlike lengths, and batches of several, are outside of them.
"""

from __future__ import annotations


def single_s(rate: float, alone_s: float) -> float:
    """Equation 1: D + R D^2 / (2 (1 - R D)), for R `rate` a second and D seconds alone. Raises ValueError at R D >= 1."""
    return alone_s + _check(rate * alone_s, 1.0) * alone_s / (2.0 * (1.0 - rate * alone_s))


def inter_operator_s(rate: float, alone_s: float) -> float:
    """Equation 2, two stages: D + R D^2 / (4 (2 - R D)). Raises ValueError at R D >= 2."""
    return alone_s + _check(rate * alone_s, 2.0) * alone_s / (4.0 * (2.0 - rate * alone_s))


def intra_operator_s(rate: float, alone_s: float, speedup: float) -> float:
    """Equation 3, a prompt `speedup` K times as fast: D / K + R D^2 / (2 K (K - R D)). Raises ValueError at R D >= K."""
    load = _check(rate * alone_s, speedup)
    return alone_s / speedup + load * alone_s / (2.0 * speedup * (speedup - load))


def _check(load: float, below: float) -> float:
    if not 0.0 <= load < below:
        raise ValueError(f"a load of {load:g} is not in [0, {below:g}): the queue has no mean")
    return load
