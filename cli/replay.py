"""`mobula replay`: open-loop load on any OpenAI endpoint, from a trace or a generator, and the report of it."""

from __future__ import annotations

import asyncio
import statistics
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import InvalidConfig, MobulaError, Unreachable

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.record import TraceRow
    from workloads.client import Load, Target
    from workloads.reshape import Scale

MAX_ROWS = 1_000_000  # Held in memory, about 1 KB each; more than a day at ten requests per second.
ROLLING = 50
CONNECT_S = 5.0


def replay(
    trace: Annotated[str, typer.Argument(help="Trace file (Azure LLM, Mooncake, BurstGPT, request log) or a generator.")],
    url: Annotated[str, typer.Option(help="Server, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="By default the first that the server lists.")] = None,
    api: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="API key.")] = None,
    start: Annotated[float, typer.Option(min=0, help="Minutes of the trace to skip.")] = 0.0,
    minutes: Annotated[float | None, typer.Option(min=0, help="Minutes of the trace to play; all by default.")] = None,
    scale_rate: Annotated[float, typer.Option(min=1e-6, help="2 plays the trace twice as fast.")] = 1.0,
    scale_prompt: Annotated[float, typer.Option(min=1e-6, help="Factor for prompt lengths.")] = 1.0,
    scale_output: Annotated[float, typer.Option(min=1e-6, help="Factor for output lengths.")] = 1.0,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Cut longer prompts, after scaling.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Cut longer outputs, after scaling.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Words instead of exact token ids (always with chat).")] = False,
    force_length: Annotated[bool, typer.Option(help="Send ignore_eos and min_tokens for outputs of the trace's length.")] = True,
    max_in_flight: Annotated[int, typer.Option(min=1, help="Bound on open requests; reported if reached.")] = 1024,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for one request.")] = 300.0,
    slo_ttft: Annotated[float | None, typer.Option(min=0, help="Seconds to the first token.")] = 1.0,
    slo_tpot: Annotated[float | None, typer.Option(min=0, help="Seconds per token after the first.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of generators and prompts.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG.")] = None,
) -> None:
    """Send a trace's requests at their times and report latency and goodput.

    Exits with 0, with 1 if any request was rejected or failed, and with 2 on bad input.

    Examples:

    mobula replay azure_conv.csv --minutes 5 --scale-prompt 0.1 --scale-output 0.1

    mobula replay conversation_trace.jsonl --scale-rate 2 --slo-ttft 0.5 --slo-tpot 0.05 --plot run.png

    mobula replay "poisson:rate=4,minutes=2,prompt=lognormal(200,0.6),output=fixed(32)" --seed 7 --json

    mobula replay "steps:rates=2x40/8x40/2x40,prompt=uniform(50,400),output=fixed(32),shared=0.5,prefix=64"
    """
    import msgspec
    from rich.console import Console

    from cluster.slo import Slo
    from workloads.client import Target
    from workloads.report import render, summarise
    from workloads.reshape import Scale

    console = Console(stderr=True)
    try:
        if api not in ("completions", "chat"):
            raise InvalidConfig(f"--api {api!r} is neither completions nor chat")
        if plot and not plot.absolute().parent.is_dir():
            raise InvalidConfig(f"--plot {plot}: there is no directory {plot.absolute().parent}")
        scale = Scale(
            prompt=scale_prompt,
            output=scale_output,
            rate=scale_rate,
            max_prompt_tokens=max_prompt_tokens,
            max_output_tokens=max_tokens,
        )
        rows = load_rows(trace, 60 * start, None if minutes is None else 60 * minutes, scale, seed)
        served = asyncio.run(served_model(url, key))
        target = Target(
            url=url, model=model or served, api=api, key=key, text=text, force_length=force_length, seed=seed,
            timeout_s=timeout, max_in_flight=max_in_flight,
        )  # fmt: skip
        load = asyncio.run(watched(rows, target, console))
    except MobulaError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error

    slo = Slo(ttft_s=slo_ttft, tpot_s=slo_tpot)
    report = summarise(load, slo)
    if json:
        typer.echo(msgspec.json.encode(report))
    else:
        Console().print(render(report))
    for detail in dict.fromkeys(f"{sample.timing.error}: {sample.detail}" for sample in load.samples if sample.timing.error):
        console.print(detail, style="red", markup=False, highlight=False, soft_wrap=True)
        break
    if plot:
        from workloads.plot import plot as draw

        draw(load, slo, plot, title=f"{trace} on {target.model}")
        console.print(f"plot: {plot}", highlight=False, soft_wrap=True)
    if report.completed < report.requests:
        raise typer.Exit(1)


def load_rows(trace: str, start_s: float, span_s: float | None, scale: Scale, seed: int) -> list[TraceRow]:
    """The rows to send, in order of arrival. Raises InvalidTrace or InvalidConfig."""
    from workloads.generators import is_generator, parse_generator
    from workloads.reshape import window
    from workloads.traces import open_trace

    if is_generator(trace):
        rows, ordered = parse_generator(trace).rows(seed), True
    else:
        source = open_trace(trace)
        rows, ordered = iter(source), source.ordered
    chosen = []
    for row in window(rows, start_s, span_s, ordered=ordered):
        chosen.append(scale(row))
        if len(chosen) > MAX_ROWS:
            raise InvalidConfig(f"{trace}: more than {MAX_ROWS} requests; choose fewer with --minutes")
    if not chosen:
        raise InvalidConfig(f"{trace}: no request arrives in the chosen minutes")
    return sorted(chosen, key=lambda row: row.arrival_s)


async def served_model(url: str, key: str | None) -> str:
    """The first model that a server lists. Raises Unreachable where nobody listens, InvalidConfig where it is no OpenAI server."""
    import aiohttp

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    where = f"{url.rstrip('/')}/v1/models"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CONNECT_S)) as session,
            session.get(where, headers=headers) as response,
        ):
            if response.status != 200:
                raise InvalidConfig(f"GET {where} answered {response.status}: {(await response.text())[:200]}")
            return str((await response.json())["data"][0]["id"])
    except aiohttp.InvalidURL as error:
        raise InvalidConfig(f"--url {url!r} is no URL") from error
    except (aiohttp.ClientError, TimeoutError) as error:
        raise Unreachable(f"no server answers at {url}: {str(error) or f'silent for {CONNECT_S:g} s'}") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InvalidConfig(f"GET {where} did not answer with a list of models") from error


async def watched(rows: list[TraceRow], target: Target, console: Console) -> Load:
    """Run, with a progress bar on a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from workloads.client import Load, Sample, run

    load, recent = Load(), deque[float](maxlen=ROLLING)
    failed = 0

    def note(sample: Sample) -> None:
        nonlocal failed
        failed += not sample.timing.completed
        if sample.timing.completed and sample.timing.ttft_s is not None:
            recent.append(sample.timing.ttft_s)

    columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(rows))

        async def show() -> None:
            while True:
                ttft = f"{1e3 * statistics.median(recent):.0f} ms" if recent else "-"
                state = f"in flight {load.in_flight}  errors {failed}  TTFT {ttft}"
                progress.update(bar, completed=len(load.samples), description=state)
                await asyncio.sleep(0.25)

        shower = asyncio.create_task(show())
        try:
            return await run(rows, target, load, note)
        finally:
            progress.update(bar, completed=len(load.samples))
            shower.cancel()
            with suppress(asyncio.CancelledError):
                await shower
