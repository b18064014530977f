"""What a burst costs until the SLO is met again, in virtual time: `python -m benchmarks.burst_virtual [--seeds 5] [--json]`.

In the closed loop of `benchmarks.closed_loop` a steady load is multiplied by four at once and stays there for ten minutes. Measured
from that moment: seconds until the SLO is met again, which is until the last five seconds of arrivals of which fewer than 95 % were
served inside it; requests that missed it; and replica-seconds held. With the default pipeline, and with a queue-length rule on the
defaults of Kubernetes' horizontal autoscaler, for which three targets are tried. A start takes a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.closed_loop import QUEUE_TARGET, ClosedLoop, Ended, PipelineScaler, QueueRule, Scaler, Setting

STEADY_RPS, FACTOR = 3.0, 4.0
STEADY_S, BURST_S = 400.0, 600.0
BIN_S, MET_SHARE = 5.0, 0.95
ANSWER_S = 40.0
"""Within which any answer ends: of those that arrive later, the run sees only the quick ones."""
TARGETS = {"hpa tight": QUEUE_TARGET / 1.5, "hpa": QUEUE_TARGET, "hpa loose": QUEUE_TARGET * 1.5}
RULES = ("mobula", *TARGETS)


class Answer(NamedTuple):
    """One rule's to one burst."""

    rule: str
    to_slo_s: float
    missed: int
    replica_s: float
    most_replicas: int


def scaler(rule: str) -> Scaler:
    return PipelineScaler() if rule == "mobula" else QueueRule(TARGETS[rule])


def answer(rule: str, seed: int) -> Answer:
    setting = Setting()
    setting = Setting(replicas=setting.carried(STEADY_RPS))
    steps = [(STEADY_RPS, STEADY_S), (FACTOR * STEADY_RPS, BURST_S)]
    loop = ClosedLoop(setting, setting.rows(steps, seed), scaler(rule))
    asyncio.run(loop.run(STEADY_S + BURST_S))
    late = [one for one in loop.ended if STEADY_S <= one.arrival_s < STEADY_S + BURST_S - ANSWER_S]
    held = [count.held for count in loop.counts if count.at_s > STEADY_S]
    return Answer(rule, to_slo_s(late), sum(not one.kept for one in late), sum(held), max(held))


def to_slo_s(ended: Sequence[Ended]) -> float:
    """From the step to the end of the last bin of arrivals in which too few were served inside the SLO."""
    bins: dict[int, list[bool]] = defaultdict(list)
    for one in ended:
        bins[int((one.arrival_s - STEADY_S) // BIN_S)].append(one.kept)
    return BIN_S * max((number + 1 for number, kept in bins.items() if fmean(kept) < MET_SHARE), default=0)


def _answer(arguments: tuple[str, int]) -> Answer:
    return answer(*arguments)


def measure(seeds: int) -> list[Answer]:
    work = [(rule, seed) for seed in range(seeds) for rule in RULES]
    answers = []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for done in pool.imap_unordered(_answer, work):
            answers.append(done)
            print(f"{len(answers)} of {len(work)}: {done.rule}, {done.to_slo_s:.0f} s to SLO", file=sys.stderr, flush=True)
    return answers


def figures(answers: Sequence[Answer]) -> dict[str, float]:
    found: dict[str, float] = {}
    for rule in RULES:
        mine = [one for one in answers if one.rule == rule]
        name = rule.replace(" ", "_")
        found |= {f"{name}_{field}": round(fmean(getattr(one, field) for one in mine), 1) for field in Answer._fields[1:]}
        found[f"{name}_worst_to_slo_s"] = max(one.to_slo_s for one in mine)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--seeds", type=int, default=5)
    asked = parser.parse_args()
    found = figures(measure(asked.seeds))
    _print(found)
    if asked.json:
        print(json.dumps(found))


def _print(found: Mapping[str, float]) -> None:
    table = Table(title=f"{STEADY_RPS:.0f} requests/s become {FACTOR * STEADY_RPS:.0f}, means")
    for column in ("", "to SLO, s", "worst, s", "missed", "replica-seconds", "most replicas"):
        table.add_column(column, justify="right" if column else "left")
    for rule in RULES:
        name = rule.replace(" ", "_")
        fields = ("to_slo_s", "worst_to_slo_s", "missed", "replica_s", "most_replicas")
        table.add_row(rule, *(f"{found[f'{name}_{field}']:,.0f}" for field in fields))
    Console().print(table)


if __name__ == "__main__":
    main()
