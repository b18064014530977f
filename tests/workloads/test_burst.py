"""The bundled burst is what its generator makes."""

from pathlib import Path

import demo.burst
from workloads.generators import parse_generator
from workloads.traces import open_trace


def test_the_bundled_burst_is_made_by_its_generator():
    rows = list(open_trace(Path(demo.burst.__file__).with_name("burst.jsonl")))
    assert rows == list(parse_generator(demo.burst.BURST).rows(demo.burst.SEED))
    assert rows[-1].arrival_s < 120
