"""`make demo`: a fleet, two minutes of load, a killed decode worker, and what the clients saw of it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from cli.fleet_home import FleetHome, FleetStatus
from cli.status import fetch, table
from cluster.record import TraceRow
from cluster.slo import Slo
from workloads.client import Load, Target, run
from workloads.plot import Mark, plot
from workloads.report import render, summarise
from workloads.traces import open_trace

HERE = Path(__file__).parent
OUT = HERE.parent / ".mobula"
CONFIG = HERE / "cluster.yaml"
TRACE = HERE / "burst.jsonl"
MODEL = "tiny-dense"
FLEET = FleetHome("demo")
SLO = Slo(ttft_s=0.5, tpot_s=0.1)
KILL_AT_S = 60.0  # In the middle of the burst.
REFRESH_S = 0.5
SHOWN_TEXTS = 3


def main() -> int:
    """The whole show; 1 if any request failed, and the code of `mobula up` if there was nothing to show."""
    console = Console()
    if up := mobula("up", "-f", str(CONFIG)):
        return up  # It has said why.
    try:
        url = fetch(FLEET).url
        load, marks = asyncio.run(burst(list(open_trace(TRACE)), url, console))
    finally:
        mobula("down", FLEET.path.name)
    report = summarise(load, SLO, workload=TRACE.name, target=f"{MODEL} at {url}")
    console.print(render(report))
    show_texts(console, load)
    picture = OUT / "demo.png"
    plot(load, SLO, picture, title="A burst on 1 prefill and 2 decode replicas", marks=marks)
    (OUT / "demo.json").write_bytes(msgspec.json.encode(report))
    console.print(f"plot: {picture}\nreport: {OUT / 'demo.json'}", highlight=False)
    return int(report.completed < report.requests)


def mobula(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "cli.main", *arguments], check=False).returncode


async def burst(rows: list[TraceRow], url: str, console: Console) -> tuple[Load, list[Mark]]:
    """Replay the rows, killing a decode worker on the way, with the fleet's table on screen."""
    load = Load()
    replay = asyncio.create_task(run(rows, Target(url=url, model=MODEL, text=True), load))
    killer = asyncio.create_task(kill_a_decode_worker(console))
    started_s = time.monotonic()
    with Live(console=console, refresh_per_second=2) as live:
        while not replay.done():
            # Apart from the loop, which times tokens: a supervisor that asks a dead worker takes seconds to answer.
            now = await asyncio.to_thread(fetch, FLEET)
            live.update(screen(now, load, len(rows), time.monotonic() - started_s))
            await asyncio.wait([replay], timeout=REFRESH_S)
    await replay
    return load, [await killer]


def screen(now: FleetStatus, load: Load, total: int, elapsed_s: float) -> Group:
    done = len(load.samples)
    failed = sum(not sample.timing.completed for sample in load.samples)
    line = Text(f"{elapsed_s:5.0f} s   {done} of {total} requests done, {load.in_flight} in flight, {failed} failed")
    return Group(table(now), ProgressBar(total=total, completed=done), line)


async def kill_a_decode_worker(console: Console) -> Mark:
    """kill -9 the busiest decode worker once the burst is on."""
    await asyncio.sleep(KILL_AT_S)
    now = await asyncio.to_thread(fetch, FLEET)
    decoders = [row for row in now.replicas if row.role == "decode" and row.pid]
    victim = max(decoders, key=lambda row: row.running)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    console.print(f"{KILL_AT_S:.0f} s: kill -9 {victim.pid}, which was {victim.replica_id}", style="bold red")
    return Mark(KILL_AT_S, f"kill {victim.replica_id}")


def show_texts(console: Console, load: Load) -> None:
    """What the model said, of a few of the answers. It is a small model: it prints words, not sense."""
    told = [sample for sample in load.samples if len(sample.text) > 60][:SHOWN_TEXTS]
    for sample in told:
        console.print(Text(f"> {' '.join(sample.text.split())[:160]}", style="italic"))


if __name__ == "__main__":
    sys.exit(main())
