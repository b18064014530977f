"""The demo's traffic is made by what says so."""

from pathlib import Path

import demo
from cluster.record import to_line
from demo.traffic import rows


def test_the_file_is_what_its_recipe_makes():
    assert (Path(demo.__file__).parent / "traffic.jsonl").read_bytes() == b"".join(map(to_line, rows()))
