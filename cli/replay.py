"""`mobula replay`: open-loop load on any OpenAI endpoint, from a trace or a generator, and the report of it."""

from __future__ import annotations

import asyncio
import json
import resource
import statistics
from collections import deque
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cluster.errors import InvalidConfig, Unreachable

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.record import TraceRow
    from workloads.client import Load, Target
    from workloads.stream import Workload

MAX_ROWS = 1_000_000  # Held in memory, about 1 KB each; more than a day at ten requests per second.
ROLLING = 50
CONNECT_S = 5.0
MAX_MODELS_BYTES = 2**20
SPARE_FILES = 64  # Beside sockets: libraries, logs, the event loop.
EXIT_INTERRUPTED = 130  # As a shell says of a command that SIGINT ended.


def _option(panel: str, metavar: str | None, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, metavar=metavar, help=help, **more)


ENDPOINT, TRACE, REPORT = "Endpoint", "Trace", "Report"


def replay(
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE",
            help="Trace file (Azure LLM, Mooncake, BurstGPT, request log) or generator (poisson, gamma, steps, diurnal, sessions).",
        ),
    ],
    url: Annotated[str, _option(ENDPOINT, "URL", "Server, with or without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, _option(ENDPOINT, "NAME", "By default the first that the server lists.")] = None,
    api: Annotated[Literal["completions", "chat"], _option(ENDPOINT, None, "What to ask with.")] = "completions",
    key: Annotated[str | None, _option(ENDPOINT, "KEY", "API key.", envvar="OPENAI_API_KEY")] = None,
    text: Annotated[bool, _option(ENDPOINT, None, "Words, not exact token ids; always with chat.", "--text")] = False,
    force_length: Annotated[bool, _option(ENDPOINT, None, "Send ignore_eos and min_tokens: outputs as long as traced.")] = True,
    max_priority: Annotated[
        int | None, _option(ENDPOINT, "N", "Highest that the key may ask for; rows above it ask for it. By default 0 with a key.")
    ] = None,
    max_in_flight: Annotated[int, _option(ENDPOINT, "N", "Bound on open requests; reported if reached.", min=1)] = 1024,
    timeout: Annotated[float, _option(ENDPOINT, "S", "Seconds for one request.", min=0.001)] = 300.0,
    start: Annotated[float, _option(TRACE, "MIN", "Minutes of the trace to skip.", min=0)] = 0.0,
    minutes: Annotated[float | None, _option(TRACE, "MIN", "Minutes to play; all by default.", min=0)] = None,
    scale_rate: Annotated[float, _option(TRACE, "X", "2 plays the trace twice as fast.", min=1e-6)] = 1.0,
    scale_prompt: Annotated[float, _option(TRACE, "X", "Factor for prompt lengths.", min=1e-6)] = 1.0,
    scale_output: Annotated[float, _option(TRACE, "X", "Factor for output lengths.", min=1e-6)] = 1.0,
    max_prompt_tokens: Annotated[int | None, _option(TRACE, "N", "Cut longer prompts, after scaling.", min=1)] = None,
    max_tokens: Annotated[int | None, _option(TRACE, "N", "Cut longer outputs, after scaling.", min=1)] = None,
    seed: Annotated[int, _option(TRACE, "N", "Of generators and prompts.")] = 0,
    slo_ttft: Annotated[float | None, _option(REPORT, "S", "Seconds to the first token.", min=0)] = 1.0,
    slo_tpot: Annotated[float | None, _option(REPORT, "S", "Seconds per token after the first.", min=0)] = 0.1,
    as_json: Annotated[bool, _option(REPORT, None, "The report as one JSON object, the last line.", "--json")] = False,
    plot: Annotated[Path | None, _option(REPORT, "FILE", "Write a PNG.")] = None,
) -> None:
    """Send a trace's requests at their times and report latency and goodput.

    Exits with 0; 1 if any request was rejected or failed; 2 on bad input; 75 where no server answers; 130 on Ctrl-C, which
    reports what has ended by then.

    Examples:

    mobula replay azure_conv.csv --minutes 5 --scale-prompt 0.1 --scale-output 0.1

    mobula replay conversation_trace.jsonl --scale-rate 2 --slo-ttft 0.5 --slo-tpot 0.05 --plot run.png

    mobula replay "poisson:rate=4,minutes=2,prompt=lognormal(200,0.6),output=fixed(32)" --seed 7 --json

    mobula replay "steps:rates=2x40/8x40/2x40,prompt=uniform(50,400),output=fixed(32),shared=0.5,prefix=64"

    mobula replay "diurnal:low=1,high=5,period_h=0.5,hours=1,lengths=azure_conv.csv,tenants=a:3/b:1,priorities=0:9/5:1"

    mobula replay "sessions:rate=0.5,minutes=10,turns=geometric(5),think=lognormal(30,0.8),prompt=fixed(80),output=fixed(60)"
    """
    import msgspec
    from rich.console import Console

    from cluster.slo import Slo
    from workloads.client import Load, Target
    from workloads.report import render, summarise
    from workloads.reshape import Scale
    from workloads.stream import open_workload

    console = Console(stderr=True)
    if plot and not plot.absolute().parent.is_dir():
        raise InvalidConfig(f"--plot {plot}: there is no directory {plot.absolute().parent}")
    scale = Scale(
        prompt=scale_prompt, output=scale_output, rate=scale_rate, max_prompt_tokens=max_prompt_tokens, max_output_tokens=max_tokens
    )  # fmt: skip
    workload = open_workload(trace, seed=seed, start_s=60 * start, span_s=None if minutes is None else 60 * minutes, scale=scale)
    rows = load_rows(workload)
    allow_open_files(max_in_flight)
    url = url.rstrip("/").removesuffix("/v1")
    model = asyncio.run(served_model(url, key, model))
    target = Target(
        url=url, model=model, api=api, key=key, text=text, force_length=force_length, seed=seed, timeout_s=timeout,
        max_in_flight=max_in_flight, max_priority=0 if max_priority is None and key else max_priority,
    )  # fmt: skip
    _say(console, f"{len(rows)} requests in {rows[-1].arrival_s:.0f} s of {workload.words}")
    load, interrupted = Load(), False
    try:
        asyncio.run(watched(rows, target, load, console))
    except KeyboardInterrupt:
        interrupted = True
        _say(console, f"stopped: of {len(rows)} requests {load.sent} were sent and {len(load.samples)} had ended", style="yellow")

    report = summarise(load, Slo(ttft_s=slo_ttft, tpot_s=slo_tpot), workload=workload.words, target=f"{model} at {url}")
    for kind, detail in {sample.timing.error: sample.detail for sample in reversed(load.samples) if sample.timing.error}.items():
        _say(console, f"{kind}: {detail}", style="red")
    if plot:
        from workloads.plot import plot as draw

        draw(load, report.slo, plot, title=f"{trace} on {model}")
        _say(console, f"plot: {plot}")
    if as_json:
        typer.echo(msgspec.json.encode(report))
    else:
        Console().print(render(report))
    if interrupted or report.completed < report.requests:
        raise typer.Exit(EXIT_INTERRUPTED if interrupted else 1)


def _say(console: Console, line: str, style: str = "") -> None:
    """One line as it is, however long: it may hold brackets, paths and a server's words."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def allow_open_files(sockets: int) -> None:
    """Raise the process's limit on open files to that many sockets and some. Raises InvalidConfig above what the system allows."""
    needed = sockets + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise InvalidConfig(f"--max-in-flight {sockets} is above {hard - SPARE_FILES}, which the limit of {hard} open files leaves")
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def load_rows(workload: Workload) -> list[TraceRow]:
    """All its rows. Raises InvalidTrace or InvalidConfig."""
    rows = list(islice(workload, MAX_ROWS + 1))
    if len(rows) > MAX_ROWS:
        raise InvalidConfig(f"{workload.words}: more than {MAX_ROWS} requests; choose fewer with --minutes")
    return rows


async def served_model(url: str, key: str | None, model: str | None) -> str:
    """The model asked for, or the first of those that a server lists.

    Raises Unreachable where nobody answers, InvalidConfig where it is no OpenAI server or has no such model.
    """
    import aiohttp

    if not url.startswith(("http://", "https://")):
        raise InvalidConfig(f"--url {url!r} does not begin with http:// or https://")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    where = f"{url}/v1/models"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CONNECT_S)) as session,
            session.get(where, headers=headers) as response,
        ):
            status, body = response.status, await response.content.read(MAX_MODELS_BYTES)
    except aiohttp.InvalidURL as error:
        raise InvalidConfig(f"--url {url!r} is no URL") from error
    except (aiohttp.ClientError, TimeoutError) as error:
        raise Unreachable(f"no server answers at {url}: {str(error) or f'silent for {CONNECT_S:g} s'}") from error
    if status != 200:
        raise InvalidConfig(f"GET {where} answered {status}: {body.decode(errors='replace')[:200]}")
    models = model_names(where, body)
    if model is not None and model not in models:
        raise InvalidConfig(f"--model {model} is none of those at {url}: {', '.join(models)}")
    return model or models[0]


def model_names(where: str, body: bytes) -> list[str]:
    """Of a list of models as OpenAI's API answers it, at least one."""
    try:
        names = [str(entry["id"]) for entry in json.loads(body)["data"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidConfig(f"GET {where} did not answer with a list of models but with {body[:40]!r}") from error
    if not names:
        raise InvalidConfig(f"GET {where} lists no model")
    return names


async def watched(rows: list[TraceRow], target: Target, load: Load, console: Console) -> None:
    """Run, with a progress bar on a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from workloads.client import Sample, run

    recent = deque[float](maxlen=ROLLING)
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
            await run(rows, target, load, note)
        finally:
            progress.update(bar, completed=len(load.samples))
            shower.cancel()
            with suppress(asyncio.CancelledError):
                await shower
