"""The demo's own request log replayed in simulated time: `python -m benchmarks.demo_simulated [LOG] [--json]`.

LOG is what `make demo` names at its end; by default it is the newest, with the journal of the last run. The same cluster.yaml, the
same arrivals and lengths, and the same node killed at the same time go through the same policies. The world's step times are those
that the policies believe, since a paced replica's steps last just as long. Live figures are the gateway's own. Nothing is fitted.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.agreement import Agreement, agreement, table
from benchmarks.live_vs_simulated import HOST_BYTES_S, layout_of
from benchmarks.simulated_replay import Replayed, replay
from cluster.errors import InvalidTrace
from cluster.fleet import Fleet
from cluster.record import RequestRecord, TraceRow
from cluster.slo import RequestTiming, Slo, meets
from controller.config import load_fleet
from controller.journal import Journal
from demo.__main__ import CONFIG, FLEET, KILL_AT_S, SLO, TRACE, VICTIM, newest_log
from simulator.world import Fault, World
from workers.engines.torch_engine.tiny_model import ensure
from workloads.traces import open_trace

QUANTILES = (0.5, 0.9, 0.99)
PRESET = "tiny-dense"


class Decided(NamedTuple):
    at_s: float
    """Since the traffic began."""
    words: str


class Log(NamedTuple):
    """A request log, with times since the traffic began."""

    rows: list[TraceRow]
    timings: list[RequestTiming]
    began_unix_s: float
    lead_s: float
    """From the log's opening to the traffic's beginning."""


def read_log(path: Path, first_s: float = 0.0) -> Log:
    """first_s: when the first of its requests came, since the traffic began. Raises InvalidTrace for a log without requests."""
    rows = list(open_trace(str(path)))
    decode = msgspec.json.Decoder(RequestRecord).decode
    records = sorted((decode(line) for line in path.read_bytes().splitlines()), key=lambda record: record.arrival_s)
    if not records:
        raise InvalidTrace(f"{path}: has no requests")
    first = records[0]
    lead_s = first.arrival_s - first_s
    return Log(rows, [_timing(record, lead_s) for record in records], first.arrival_unix_s - first_s, lead_s)


def _timing(record: RequestRecord, lead_s: float) -> RequestTiming:
    def since(seconds: float | None) -> float | None:
        return None if seconds is None else record.arrival_s - lead_s + seconds

    failed = None if record.outcome == "completed" else record.error or record.outcome
    return RequestTiming(
        arrival_s=record.arrival_s - lead_s,
        first_token_s=since(record.ttft_s),
        last_token_s=since(record.e2e_s),
        output_tokens=record.output_tokens,
        error=failed,
    )


def decided_live(path: Path, began_unix_s: float) -> list[Decided]:
    """From the journal."""
    journal = Journal(path, read_only=True)
    return [
        Decided(choice.at_s - began_unix_s, action.words)
        for choice in journal.choices()
        for action in choice.decision.actions
        if choice.at_s >= began_unix_s
    ]


def simulated(fleet: Fleet, log: Log, model: Path, faults: Sequence[Fault], hop_s: float) -> Replayed:
    layouts = {group.role.value: layout_of(model, group.block_tokens) for group in fleet.replicas}
    late = tuple(msgspec.structs.replace(fault, at_s=fault.at_s + log.lead_s) for fault in faults)
    world = World(
        step_times="believed",
        layouts=layouts,
        replica_speed_sd=0.0,
        startup_sd=0.0,
        hop_s=hop_s,
        link_bytes_per_s=HOST_BYTES_S,
        faults=late,
    )
    return replay(fleet, log.rows, world, control=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "log", type=Path, nargs="?", default=None, help="requests-*.jsonl of a run of the demo; the newest by default"
    )
    parser.add_argument("--fleet", type=Path, default=CONFIG, help="its cluster.yaml")
    parser.add_argument("--journal", type=Path, default=FLEET.journal_path, help="of the same run, for what was decided")
    parser.add_argument(
        "--kill-at", type=float, default=KILL_AT_S, help=f"when {VICTIM} was killed, in seconds since the traffic began"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    fleet = load_fleet(arguments.fleet)
    log = read_log(arguments.log or newest_log(), next(iter(open_trace(str(TRACE)))).arrival_s)
    fault = Fault(at_s=arguments.kill_at, kind="lose_node", target=VICTIM)
    found = simulated(fleet, log, ensure(PRESET), [fault], World().hop_s)
    compared = agreement("the whole demo", log.timings, found.timings, QUANTILES)
    live = decided_live(arguments.journal, log.began_unix_s)
    then = [Decided(act.at_s - log.lead_s, act.action) for act in found.result.acts]
    counts = {"live": counted(log.timings, SLO), "simulated": counted(found.timings, SLO)}
    show(compared, counts, live, then)
    if arguments.json:
        print(json.dumps(_json(compared, counts, live, then)))


def counted(timings: Sequence[RequestTiming], slo: Slo) -> dict[str, float]:
    """Requests that completed, and those that kept the SLO."""
    return {"completed": sum(one.completed for one in timings), "in_slo": sum(meets(one, slo) for one in timings)}


def show(compared: Agreement, counts: dict[str, dict[str, float]], live: Sequence[Decided], then: Sequence[Decided]) -> None:
    console = Console(width=140)
    console.print(table("The demo, live and simulated", [compared]))
    for name, count in counts.items():
        share = count["in_slo"] / max(1, count["completed"])
        console.print(f"{name}: {count['completed']:.0f} completed, {count['in_slo']:.0f} within the SLO ({share:.1%})")
    decisions = Table(title="Decisions, in seconds since the traffic began", title_justify="left")
    for heading in ("s", "live", "s", "simulated"):
        decisions.add_column(heading, justify="right" if heading == "s" else "left")
    for row in range(max(len(live), len(then))):
        cells = [(f"{side[row].at_s:.0f}", side[row].words) if row < len(side) else ("", "") for side in (live, then)]
        decisions.add_row(*cells[0], *cells[1])
    console.print(decisions)


def _json(
    compared: Agreement, counts: dict[str, dict[str, float]], live: Sequence[Decided], then: Sequence[Decided]
) -> dict[str, Any]:
    return {
        "live_s": compared.live_s,
        "simulated_s": compared.simulated_s,
        "error": compared.errors,
        "mean_error": compared.mean_error,
        "counts": counts,
        "decided": {name: [one._asdict() for one in side] for name, side in (("live", live), ("simulated", then))},
        "load_average": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
