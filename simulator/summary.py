"""A simulation's result as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from simulator.result import Quantiles, Result
from simulator.sketch import ERROR

SHOWN = 20  # Decisions and events; all are in the JSON and, up to its own bound, in the report.
HOUR_S, MINUTE_S = 3600, 60


def summary(result: Result, shown: int = SHOWN) -> Group:
    """The whole of it, decisions and events up to `shown` of each."""
    parts: list[RenderableType] = [_headline(result), _latency(result), _totals(result)]
    if result.acts:
        parts.append(_acts(result, shown))
    if result.events:
        parts.append(_events(result, shown))
    parts += [Text(f"warning: {words}", style="yellow") for words in result.warnings]
    parts.append(Text(speed(result), style="dim"))
    return Group(*parts)


def headline(result: Result) -> str:
    """One sentence on what came of it."""
    rejected = sum(result.rejected.values())
    kept = f"{result.attainment:.1%} of {result.arrived:,} requests within their SLO"
    cost = f"${result.usd:,.2f} for {clock(result.span_s)}"
    said = f"{kept}, {result.goodput_rps:.2f}/s; {rejected:,} rejected; {cost}"
    return f"interrupted after {clock(result.span_s)} of simulated time; so far {said}" if result.interrupted else said


def speed(result: Result) -> str:
    """What simulating took."""
    return (
        f"simulated {clock(result.span_s)} in {result.cpu_s:.1f} s of CPU: {result.requests_per_cpu_s:,.0f} requests per "
        f"CPU second, at most {result.peak_rss_mb:,.0f} MB; {result.passes:,} passes of the controller"
    )


def clock(seconds: float) -> str:
    """A length of time or a time since the start: `1:02:03`, `2:03`."""
    whole = round(seconds)
    hours, rest = divmod(whole, HOUR_S)
    return f"{hours}:{rest // MINUTE_S:02d}:{rest % MINUTE_S:02d}" if hours else f"{rest // MINUTE_S}:{rest % MINUTE_S:02d}"


def totals(result: Result) -> Iterator[tuple[str, str]]:
    """What was counted, each with its name."""
    share = 1.0 / result.arrived if result.arrived else 0.0
    yield "arrived after the warm-up", f"{result.arrived:,} in {clock(result.span_s - result.warm_up_s)}"
    yield "completed", f"{result.completed:,} ({result.completed * share:.2%})"
    yield "within the whole SLO", f"{result.kept:,} ({result.attainment:.2%})"
    yield "goodput", f"{result.goodput_rps:.2f} requests/s"
    for why, count in result.rejected.items():
        yield f"rejected: {why}", f"{count:,} ({count * share:.2%})"
    yield "attempts after the first", f"{result.retries:,}"
    yield "preemptions", f"{result.preemptions:,}"
    yield "prompt tokens", f"{result.prompt_tokens:,} ({result.cached_share:.1%} cached)"
    yield "output tokens", f"{result.output_tokens:,}"
    yield "KV transfers", f"{result.transfers:,}"
    yield "nodes", f"${result.usd:,.2f}{_per_million(result.usd_per_million_output_tokens, '${:,.2f}')}"
    yield "energy", f"{result.kwh:,.2f} kWh{_per_million(result.kwh_per_million_output_tokens, '{:,.2f} kWh')}"
    yield "replicas", f"{result.replica_hours:,.1f} replica-hours, {result.utilisation:.1%} of them computing"


def latencies(result: Result) -> Iterator[tuple[str, str, Quantiles | None, float | None]]:
    """SLO class, measure, quantiles, bound."""
    for name, found in result.classes.items():
        yield name, "TTFT", found.ttft_s, found.slo.ttft_s
        yield name, "TPOT", found.tpot_s, found.slo.tpot_s
        yield name, "E2E", found.e2e_s, found.slo.e2e_s
    yield "all", "ITL", result.itl_s, None


def _headline(result: Result) -> Text:
    lines = Text(headline(result), style="bold yellow" if result.interrupted else "bold")
    return lines.append(f"\n{result.workload}, on {result.fleet}, seed {result.seed}", style="not bold default")


def _latency(result: Result) -> Table:
    title = f"Latency after the first {result.warm_up_s:g} s, in ms, to {ERROR:.1%}"
    table = _table(title, "class", "", ">mean", ">P50", ">P90", ">P99", ">SLO")
    before = None
    for name, measure, found, bound in latencies(result):
        cells = [f"{1e3 * value:,.1f}" for value in (found.mean, found.p50, found.p90, found.p99)] if found else ["-"] * 4
        table.add_row(name if name != before else "", measure, *cells, "" if bound is None else f"{1e3 * bound:,.0f}")
        before = name
    return table


def _totals(result: Result) -> Table:
    table = Table(title="Totals", title_justify="left", show_header=False, box=box.SIMPLE_HEAD)
    table.add_column()
    table.add_column(justify="right")
    for name, value in totals(result):
        table.add_row(name, value, style="red" if name.startswith("rejected") else None)
    return table


def _acts(result: Result, shown: int) -> Table:
    table = _table(_title("Decisions", len(result.acts), shown), ">at", "what", "why")
    for act in result.acts[:shown]:
        table.add_row(clock(act.at_s), Text(act.action), Text(act.reason))
    return table


def _events(result: Result, shown: int) -> Table:
    table = _table(_title("Events", len(result.events), shown), ">at", "kind", "what")
    for event in result.events[:shown]:
        table.add_row(clock(event.at_s), event.kind, Text(event.what))
    return table


def _title(what: str, count: int, shown: int) -> str:
    return f"{what}: {count:,}" if count <= shown else f"{what}: the first {shown} of {count:,}; --json has all"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    return table


def _per_million(value: float | None, form: str) -> str:
    return "" if value is None else f", {form.format(value)} per million output tokens"
