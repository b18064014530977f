"""Makes `traffic.jsonl`, five minutes in five acts: `python -m demo.traffic > demo/traffic.jsonl`.

It draws with Python's own Random and not as `workloads.generators` do, whose numbers may change with numpy's version: what the demo
shows, and the README tells of it, belongs to just these requests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from cluster.record import TraceRow, to_line


class Lengths(NamedTuple):
    """Tokens, lognormally distributed and clipped to [low, high]."""

    median: float
    sigma: float
    low: int
    high: int

    def draw(self, random: Random) -> int:
        return min(max(round(self.median * random.lognormvariate(0.0, self.sigma)), self.low), self.high)


class Act(NamedTuple):
    """Poisson arrivals: so many a second for so many seconds."""

    rate: float
    seconds: float
    prompt: Lengths
    output: Lengths


ACTS = (
    Act(1, 40, Lengths(80, 0.5, 24, 240), Lengths(40, 0.4, 16, 80)),  # Quiet.
    Act(6, 75, Lengths(80, 0.5, 24, 240), Lengths(40, 0.4, 16, 80)),  # A burst of long answers.
    Act(6.5, 20, Lengths(160, 0.4, 24, 400), Lengths(5, 0.3, 3, 10)),  # The mix turns: answers become short,
    Act(6.5, 50, Lengths(580, 0.25, 300, 800), Lengths(5, 0.3, 3, 10)),  # and prompts long.
    Act(2, 40, Lengths(160, 0.5, 24, 400), Lengths(24, 0.4, 8, 60)),  # Calmer; a node is killed in it.
    Act(0.8, 75, Lengths(80, 0.5, 24, 240), Lengths(24, 0.4, 8, 60)),  # Quiet again.
)
SEED = 7
SKIPPED_BITS = 256  # After these begin the numbers of the requests that the demo shows.


def rows() -> Iterator[TraceRow]:
    """One act after the other."""
    start_s = 0.0
    for number, act in enumerate(ACTS):
        random = Random(SEED + number)
        random.getrandbits(SKIPPED_BITS)
        passed = random.expovariate(1.0)
        while passed < act.rate * act.seconds:
            yield TraceRow(
                arrival_s=round(start_s + round(passed / act.rate, 6), 6),
                prompt_tokens=act.prompt.draw(random),
                output_tokens=act.output.draw(random),
            )
            passed += random.expovariate(1.0)
        start_s += act.seconds


if __name__ == "__main__":
    for row in rows():
        sys.stdout.buffer.write(to_line(row))
