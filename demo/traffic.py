"""Makes `traffic.jsonl`, five minutes in five acts: `python -m demo.traffic > demo/traffic.jsonl`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import msgspec

from cluster.record import TraceRow, to_line
from workloads.generators import parse_generator

ACTS = (
    "steps:rates=1x40,prompt=lognormal(80,0.5,24,240),output=lognormal(40,0.4,16,80)",  # Quiet.
    "steps:rates=6x75,prompt=lognormal(80,0.5,24,240),output=lognormal(40,0.4,16,80)",  # A burst of long answers.
    "steps:rates=6.5x20,prompt=lognormal(160,0.4,24,400),output=lognormal(5,0.3,3,10)",  # The mix turns: answers become short,
    "steps:rates=6.5x50,prompt=lognormal(580,0.25,300,800),output=lognormal(5,0.3,3,10)",  # and prompts long.
    "steps:rates=2x40,prompt=lognormal(160,0.5,24,400),output=lognormal(24,0.4,8,60)",  # Calmer; a node is killed in it.
    "steps:rates=0.8x75,prompt=lognormal(80,0.5,24,240),output=lognormal(24,0.4,8,60)",  # Quiet again.
)
SEED = 7


def rows() -> Iterator[TraceRow]:
    """One act after the other."""
    start_s = 0.0
    for number, act in enumerate(ACTS):
        generator = parse_generator(act)
        for row in generator.rows(SEED + number):
            yield msgspec.structs.replace(row, arrival_s=round(start_s + row.arrival_s, 6))
        start_s += generator.span_s


if __name__ == "__main__":
    for row in rows():
        sys.stdout.buffer.write(to_line(row))
