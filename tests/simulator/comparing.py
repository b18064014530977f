"""Small fleets, worlds and outcomes for tests that compare and search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.fleet import Fleet
from controller.config import parse_fleet
from simulator.case import Case, Traffic
from simulator.outcome import Outcome

CLUSTER = """
models: [{name: m, path: m}]
nodes:
  - {name: h0, pool: h100, accelerator: h100, slots: 2, price_usd_per_hour: 7.0}
  - {name: l0, pool: l4, accelerator: l4, slots: 1, price_usd_per_hour: 0.8}
  - {name: l1, pool: l4, accelerator: l4, slots: 2, price_usd_per_hour: 1.4}
replicas:
  - role: decode
    pool: h100
    count: 1
    min_replicas: 0
    max_replicas: 2
    engine: emulated
    pace: {shape: llama-3.1-8b, accelerator: h100}
  - role: decode
    pool: l4
    count: 1
    min_replicas: 0
    max_replicas: 3
    engine: emulated
    pace: {shape: llama-3.1-8b, accelerator: l4}
    kv_blocks: 1024
slo: {default: {ttft_s: 1.0, tpot_s: 0.1}}
gateway: {allow_anonymous: true}
control:
  challengers:
    calm:
      policies: [{use: "policies.scaling:Scaling", settings: {down_margin: 2.0}}]
"""
BRISK = "poisson:rate=4,minutes=0.75,prompt=uniform(50,600),output=uniform(20,100)"
SHORT = "poisson:rate=1,minutes=0.2,prompt=fixed(100),output=fixed(10)"


def fleet(text: str = CLUSTER) -> Fleet:
    return parse_fleet(text.encode(), Path("/"))


def case(trace: str = SHORT, **settings: Any) -> Case:
    return Case(fleet=fleet(), traffic=Traffic(trace=trace), warm_up_s=0.0, **settings)


def outcome(**settings: Any) -> Outcome:
    """Of a run that kept all; settings replace what it had."""
    plain = {
        "arrived": 100, "completed": 100, "kept": 100, "attainment": 1.0, "goodput_rps": 1.0, "ttft_p90_s": 0.1, "tpot_p90_s": 0.02,
        "usd": 1.0, "usd_per_million_output_tokens": 2.0, "kwh": 0.1, "replica_hours": 1.0, "outside": 0, "missed": {},
    }  # fmt: skip
    return Outcome(**{**plain, **settings})
