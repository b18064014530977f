"""Makes `burst.jsonl`, two minutes for a tiny model with a burst in the middle: `python -m demo.burst > demo/burst.jsonl`."""

from __future__ import annotations

import sys

from cluster.record import to_line
from workloads.generators import parse_generator

BURST = (
    "steps:rates=2x40/8.5x40/1.5x40,prompt=lognormal(110,0.6,30,400),output=lognormal(36,0.45,16,80),"
    "shared=0.5,prefix=32,prefixes=4"
)  # fmt: skip
SEED = 7

if __name__ == "__main__":
    for row in parse_generator(BURST).rows(SEED):
        sys.stdout.buffer.write(to_line(row))
