"""Claims about YAML as it is meant."""

from pathlib import Path

from cluster.node import Market
from controller.config import parse_fleet
from tests.controller.config.good import GOOD


def parsed(old: str, new: str):
    return parse_fleet(GOOD.replace("PORT", "8000").replace(old, new, 1).encode(), Path("/"))


def test_a_time_of_day_is_no_number_to_the_base_of_sixty():
    group = parsed("{role: prefill,", "{role: prefill, schedules: [{start: 09:15, end: 18:30, min_replicas: 1}],").replicas[0]
    assert (group.schedules[0].start, group.schedules[0].end) == ("09:15", "18:30")


def test_a_market_is_a_word():
    assert parsed("{name: a,", "{name: a, market: spot,").nodes[0].market is Market.SPOT


def test_a_key_may_be_merged_from_another_mapping():
    nodes = "nodes:\n  - &a {name: a, accelerator: a100-80g}\n  - {<<: *a, name: c}"
    assert parsed("nodes:\n  - {name: a, accelerator: a100-80g}", nodes).nodes[1].accelerator == "a100-80g"
