"""`make demo`: a fleet, five minutes of traffic that changes, a killed node, and every decision with its reason."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli.ask import ask
from cli.fleet_home import FleetHome
from cli.status import fetch, screen
from cluster.record import TraceRow
from cluster.slo import Slo
from controller.explanation import GroupAnswer, explain
from controller.journal import Journal
from controller.status import FleetStatus
from demo.picture import draw
from workloads.client import Load, Target, run
from workloads.plot import Mark
from workloads.report import render, summarise
from workloads.traces import open_trace

HERE = Path(__file__).parent
OUT = HERE.parent / ".mobula"
CONFIG = HERE / "cluster.yaml"
TRACE = HERE / "traffic.jsonl"
MODEL = "tiny-dense"
FLEET = FleetHome("demo")
SLO = Slo(ttft_s=2.0, tpot_s=0.15)
KILL_AT_S = 195.0
VICTIM = "l4-b"
REFRESH_S = 0.5
SHOWN_TEXTS = 3


def main() -> int:
    """The whole show; 1 if any request failed, and the code of `mobula up` if there was nothing to show."""
    console = Console()
    if up := mobula("up", "-f", str(CONFIG)):
        return up  # It has said why.
    try:
        url = fetch(FLEET).url
        began_s = time.time()
        load, kill = asyncio.run(show(list(open_trace(TRACE)), url, console))
    finally:
        mobula("down", FLEET.path.name)
    report = summarise(load, SLO, workload=TRACE.name, target=f"{MODEL} at {url}")
    console.print(render(report))
    show_texts(console, load)
    with_reasons(console, began_s, load, kill)
    (OUT / "demo.json").write_bytes(msgspec.json.encode(report))
    return int(report.completed < report.requests)


def mobula(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "cli.main", *arguments], check=False).returncode


async def show(rows: list[TraceRow], url: str, console: Console) -> tuple[Load, Mark]:
    """Replay the rows, killing a node on the way, with the fleet's tables on screen."""
    load = Load()
    replay = asyncio.create_task(run(rows, Target(url=url, model=MODEL, text=True), load))
    killer = asyncio.create_task(kill_a_node(console))
    started_s = time.monotonic()
    with Live(console=console, refresh_per_second=2) as live:
        while not replay.done():
            now = await asyncio.to_thread(fetch, FLEET)  # Apart from the loop, which times tokens.
            live.update(progress(now, load, len(rows), time.monotonic() - started_s))
            await asyncio.wait([replay], timeout=REFRESH_S)
    await replay
    return load, await killer


def progress(now: FleetStatus, load: Load, total: int, elapsed_s: float) -> Group:
    done = len(load.samples)
    failed = sum(not sample.timing.completed for sample in load.samples)
    line = Text(f"{elapsed_s:5.0f} s   {done} of {total} requests done, {load.in_flight} in flight, {failed} failed")
    return Group(screen(now), ProgressBar(total=total, completed=done), line)


async def kill_a_node(console: Console) -> Mark:
    """kill -9 of all that runs on it."""
    await asyncio.sleep(KILL_AT_S)
    said = await asyncio.to_thread(ask, FLEET, "chaos", str, what="kill", kind="node", target=VICTIM)
    console.print(f"{KILL_AT_S:.0f} s: {said}", style="bold red", highlight=False)
    return Mark(KILL_AT_S, f"kill -9 {VICTIM}")


def show_texts(console: Console, load: Load) -> None:
    """What the model said, of a few of the answers. It is a small model: it prints words, not sense."""
    told = [sample for sample in load.samples if len(sample.text) > 60][:SHOWN_TEXTS]
    for sample in told:
        console.print(Text(f"> {' '.join(sample.text.split())[:160]}", style="italic"))


def with_reasons(console: Console, began_s: float, load: Load, kill: Mark) -> None:
    """Every decision from the journal, with its reason and what would have turned it; and the picture."""
    journal = Journal(FLEET.journal_path, read_only=True)
    marks, decided = [kill], []
    counts: dict[str, list[tuple[float, int, int]]] = {}
    for entry in journal.entries():
        snapshot, at_s = entry.snapshot, entry.snapshot.now_s - began_s
        if at_s < 0.0:
            continue
        for group in snapshot.groups:
            ready = sum(one.phase.value == "ready" for one in snapshot.replicas_by_group[group.name])
            counts.setdefault(group.role.value, []).append((at_s, ready, entry.decision.targets[group.name]))
        if entry.decision.actions:
            marks += [Mark(at_s, action.words) for action in entry.decision.actions]
            decided.append((at_s, entry.number))
    table = Table(title="Decisions", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("s", "decision", "why", "what would have turned it"):
        table.add_column(heading, overflow="fold")
    for at_s, number in decided:
        shown: set[str] = set()
        for answer in explain(journal, number).groups:
            steps = [step for step in answer.actions if step.action not in shown]  # A change of role is one for two groups.
            shown |= {step.action for step in steps}
            if steps:
                done = "\n".join(f"{step.action}: {step.became}" for step in steps)
                table.add_row(f"{at_s:.0f}", done, "\n".join(dict.fromkeys(step.why for step in steps)), flip(answer))
    console.print(table)
    picture = OUT / "demo.png"
    draw(load, SLO, counts, sorted(marks, key=lambda mark: mark.at_s), picture, "Five minutes on three L4-like machines")
    told = {"picture": picture, "report": OUT / "demo.json", "journal": FLEET.journal_path, "requests": newest_log()}
    console.print("\n".join(f"{name}: {path}" for name, path in told.items()), highlight=False, soft_wrap=True)
    mobula("journal", "replay", "--fleet", FLEET.path.name)


def newest_log() -> Path:
    """Of the gateway's last start."""
    return max((OUT / "requests").glob("requests-*.jsonl"), key=lambda path: path.stat().st_mtime)


def flip(answer: GroupAnswer) -> str:
    """The nearest."""
    if not answer.flips:
        return "-"
    nearest = answer.flips[0]
    return f"{nearest.lever} {nearest.turns_at:.15g} {nearest.unit} instead of {nearest.was:.3g}: {nearest.outcome}"


if __name__ == "__main__":
    sys.exit(main())
