"""Equal keys mean equal outcomes: whatever an outcome depends on changes the key."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cluster.errors import InvalidConfig
from cluster.fleet import RoutingSpec
from simulator.case import Traffic
from simulator.digest import key_of
from simulator.world import World
from tests.simulator.comparing import case

replace = msgspec.structs.replace
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"


def test_key_is_the_same_for_an_equal_case_made_anew():
    assert key_of(case()) == key_of(case())


@pytest.mark.parametrize(
    "changed",
    [
        replace(case(), seed=1),
        replace(case(), world=World(hop_s=0.1)),
        replace(case(), traffic=Traffic(trace="poisson:rate=2,minutes=1,prompt=fixed(9),output=fixed(9)")),
        replace(case(), control=False),
        replace(case(), may_miss=5),
    ],
)
def test_key_changes_with_each_setting(changed):
    assert key_of(changed) != key_of(case())


def test_key_changes_with_what_a_trace_file_holds(tmp_path: Path):
    (tmp_path / "trace.csv").write_text(TRACE)
    before = key_of(case(str(tmp_path / "trace.csv")))
    (tmp_path / "trace.csv").write_text(TRACE.replace("374", "3740"))
    assert key_of(case(str(tmp_path / "trace.csv"))) != before


def test_key_changes_with_the_code_of_the_operators_own_router(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    own = replace(case(), fleet=replace(case().fleet, routing=RoutingSpec(use="my_router:Mine")))
    (tmp_path / "my_router.py").write_text("class Mine: ...\n")
    before = key_of(own)
    (tmp_path / "my_router.py").write_text("class Mine:\n    weight = 2\n")
    assert key_of(own) != before


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(InvalidConfig, match=r"gone\.csv: cannot be read"):
        key_of(case(str(tmp_path / "gone.csv")))
