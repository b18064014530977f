"""Whether a constant load is left alone: `python -m benchmarks.quiet [--minutes 60] [--levels 20] [--json]`.

An hour of Poisson arrivals at each of 20 constant rates, which need one to five replicas, in the closed loop of
`benchmarks.closed_loop`, each twice: with the default pipeline, and with a queue-length rule on the defaults of Kubernetes'
horizontal autoscaler. Both begin with what the sizing thinks the rate needs. The first ten minutes are for settling: the
controller's window has no past at first, and both rules look back for minutes. After them each change of the target counts as an
action; the aim is none. Virtual time runs as fast as the steps can be computed; `compression` says how much faster than the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.closed_loop import QUEUE_TARGET, ClosedLoop, PipelineScaler, QueueRule, Setting

STEP_RPS = 0.6
SETTLING_S = 600.0
RULES = {"mobula": PipelineScaler, "hpa": lambda: QueueRule(QUEUE_TARGET)}


class Hour(NamedTuple):
    """One rule at one level, after settling."""

    rule: str
    rate_rps: float
    actions: int
    replicas: float
    """Mean of those that take a place."""
    attainment: float
    compression: float


def hour(rule: str, level: int, seconds: float) -> Hour:
    """A level is a multiple of `STEP_RPS`, and a seed."""
    rate_rps, began_s = level * STEP_RPS, time.perf_counter()
    setting = Setting()
    setting = Setting(replicas=setting.carried(rate_rps))
    loop = ClosedLoop(setting, setting.rows([(rate_rps, seconds)], seed=level), RULES[rule]())
    asyncio.run(loop.run(seconds))
    settled = [count for count in loop.counts if count.at_s > SETTLING_S]
    kept = [one.kept for one in loop.ended if one.arrival_s > SETTLING_S]
    return Hour(
        rule=rule,
        rate_rps=rate_rps,
        actions=sum(one.wanted != other.wanted for one, other in itertools.pairwise(settled)),
        replicas=sum(count.held for count in settled) / len(settled),
        attainment=sum(kept) / len(kept),
        compression=seconds / (time.perf_counter() - began_s),
    )


def _hour(arguments: tuple[str, int, float]) -> Hour:
    return hour(*arguments)


def measure(levels: int, seconds: float) -> list[Hour]:
    """Every rule at every level, the longest first, on all cores."""
    work = [(rule, level, seconds) for level in range(levels, 0, -1) for rule in RULES]
    hours = []
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for done in pool.imap_unordered(_hour, work):
            hours.append(done)
            told = f"{len(hours)} of {len(work)}: {done.rule} at {done.rate_rps:.1f} requests/s, {done.actions} actions"
            print(told, file=sys.stderr, flush=True)
    return sorted(hours, key=lambda one: (one.rate_rps, one.rule))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--minutes", type=float, default=60.0, help="of virtual time, settling included; above 10")
    parser.add_argument("--levels", type=int, default=20)
    asked = parser.parse_args()
    hours = measure(asked.levels, 60 * asked.minutes)
    _print(hours)
    if asked.json:
        print(json.dumps(figures(hours)))


def figures(hours: Sequence[Hour]) -> dict[str, object]:
    found: dict[str, object] = {"compression": round(sum(one.compression for one in hours) / len(hours), 1)}
    for rule in RULES:
        mine = [one for one in hours if one.rule == rule]
        found[f"{rule}_actions"] = sum(one.actions for one in mine)
        found[f"{rule}_worst_actions"] = max(one.actions for one in mine)
        found[f"{rule}_replicas"] = round(sum(one.replicas for one in mine) / len(mine), 3)
        found[f"{rule}_attainment"] = round(sum(one.attainment for one in mine) / len(mine), 4)
        found[f"{rule}_least_attainment"] = round(min(one.attainment for one in mine), 4)
        found[f"{rule}_levels"] = [
            {"rate_rps": round(one.rate_rps, 2), "actions": one.actions, "replicas": round(one.replicas, 2)} for one in mine
        ]
    return found


def _print(hours: Sequence[Hour]) -> None:
    table = Table(title="After settling at a constant load")
    table.add_column("requests/s", justify="right")
    for rule in RULES:
        for column in ("actions", "replicas", "in SLO"):
            table.add_column(f"{rule}\n{column}", justify="right")
    by_rate: dict[float, dict[str, Hour]] = {}
    for one in hours:
        by_rate.setdefault(one.rate_rps, {})[one.rule] = one
    for rate_rps, mine in by_rate.items():
        cells = [
            cell
            for rule in RULES
            for cell in (f"{mine[rule].actions}", f"{mine[rule].replicas:.2f}", f"{mine[rule].attainment:.1%}")
        ]
        table.add_row(f"{rate_rps:.1f}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
