"""A simulation's result as one HTML page that needs no other file: figures, plots over time, decisions, settings, known errors.

It says nothing that the result and its settings do not hold; the template beside it has the words.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import jinja2
import msgspec
import yaml

from cluster.errors import InvalidConfig
from cluster.hardware import accelerator
from cluster.placement import limits_of
from cluster.step_table import Fit, StepTable
from controller.config import as_yaml, effective
from simulator.machines import Machine, machines_of
from simulator.plot import Bound, Mark, Plot, Series, scaled, svg
from simulator.result import Result
from simulator.simulation import Setup
from simulator.sketch import ERROR
from simulator.summary import clock, headline, latencies, speed, totals
from simulator.world import World

TEMPLATE = "report.html.jinja"
MOST_ROWS = 500  # Of decisions and of events: beyond, nobody reads on, and the JSON has them all.
MOST_MARKS = 400
GRAVE = ("kill", "hang", "slow", "node lost", "spot notice", "telemetry lost")
ROLES = ("prefill", "decode", "mixed")
SHOWN_VERSIONS = ("numpy", "numba", "msgspec")


class Card(msgspec.Struct, frozen=True):
    """A headline figure."""

    value: str
    name: str
    note: str = ""


class Believed(msgspec.Struct, frozen=True, kw_only=True):
    """How a group's steps are timed, for the table of machines."""

    group: str
    replicas: str
    hardware: str
    source: str
    error: str
    derived: str


def write_report(path: Path, result: Result, setup: Setup, *, command: str) -> None:
    """command: the words that were typed. Raises InvalidConfig where it cannot be written."""
    try:
        path.write_text(html(result, setup, command=command), encoding="utf-8")
    except OSError as error:
        raise InvalidConfig(f"--report {path}: cannot be written: {error.strerror}") from error


def html(result: Result, setup: Setup, *, command: str) -> str:
    """The whole page."""
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    marks = _marks(result)
    course = result.course
    until_s = max(course.every_s * len(course.arrivals), course.every_s)
    return pages.get_template(TEMPLATE).render(
        result=result,
        headline=headline(result),
        cards=list(_cards(result)),
        plots=[(plot, svg(plot, course.every_s, until_s, marks)) for plot in _plots(result)],
        latencies=list(latencies(result)),
        totals=list(totals(result)),
        machines=[_believed(machine) for machine in machines_of(setup.fleet, setup.world).values()],
        fleet_yaml=as_yaml(effective(setup.fleet)),
        world_yaml=_world_yaml(setup.world),
        setup=setup,
        command=command,
        versions=f"Mobula {version('mobula')}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in SHOWN_VERSIONS),
        speed=speed(result),
        sketch_error=ERROR,
        most_rows=MOST_ROWS,
        clock=clock,
    )


# Figures


def _cards(result: Result) -> Iterator[Card]:
    rejected = sum(result.rejected.values())
    share = rejected / result.arrived if result.arrived else 0.0
    yield Card(f"{result.attainment:.1%}", "of requests within their SLO", f"{result.kept:,} of {result.arrived:,}")
    yield Card(f"{result.goodput_rps:,.2f}/s", "goodput", "requests within their SLO")
    for name, measure, found, bound in latencies(result):
        if found and measure in ("TTFT", "TPOT") and name == next(iter(result.classes)):
            note = f"P50 {_time(found.p50)}, P99 {_time(found.p99)}" + (f"; SLO {_time(bound)}" if bound is not None else "")
            yield Card(_time(found.p90), f"{measure}, P90" + (f", class {name}" if len(result.classes) > 1 else ""), note)
    million = result.usd_per_million_output_tokens
    yield Card(f"${result.usd:,.2f}", "for nodes", "" if million is None else f"${million:,.2f} per million output tokens")
    million = result.kwh_per_million_output_tokens
    yield Card(f"{result.kwh:,.1f} kWh", "of accelerators", "" if million is None else f"{million:,.2f} per million output tokens")
    yield Card(f"{result.utilisation:.0%}", "of replicas' time computing", f"{result.replica_hours:,.1f} replica-hours")
    yield Card(f"{result.cached_share:.0%}", "of prompt tokens cached", f"{result.prompt_tokens:,} prompt tokens")
    yield Card(f"{rejected:,}", "requests rejected", f"{share:.2%}; {result.retries:,} tried again elsewhere")
    yield Card(f"{len(result.acts):,}", "decisions", f"in {result.passes:,} passes of the controller")


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1.0 else f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:,.1f} ms"


# Plots


def _plots(result: Result) -> Iterator[Plot]:
    course, every_s = result.course, result.course.every_s

    def per_s(values: Sequence[float]) -> list[float]:
        return [value / every_s for value in values]

    yield Plot(title="Replicas by role and phase", unit="replicas", series=list(_replicas(course.replicas)), wide=True)
    unknown = math.ceil(result.warm_up_s / every_s)  # Intervals in which nothing counts yet.
    arrived = Series(name="arrived", values=per_s(course.arrivals), style="blue-fill", area=True)
    rates = [
        arrived,
        Series(name="completed", values=per_s(course.completions), style="blue"),
        Series(name="completed within the SLO", values=[*[None] * unknown, *per_s(course.kept)[unknown:]], style="green"),
    ]
    if any(course.rejections):
        rates.append(Series(name="rejected", values=per_s(course.rejections), style="red"))
    yield Plot(title="Arrivals and completions", unit="requests/s", series=rates, wide=True)
    seconds = max((value for value in course.ttft_p90_s if value is not None), default=0.0) >= 2.0
    factor, unit = (1.0, "s") if seconds else (1e3, "ms")
    yield _latency("Time to first token, P90", unit, factor, course.ttft_p90_s, result, "ttft_s")
    yield _latency("Time per output token, P90", "ms", 1e3, course.tpot_p90_s, result, "tpot_s")
    yield Plot(
        title="Power of accelerators",
        unit="kW",
        series=[_one("power", scaled(course.power_w, lambda watts: watts / 1e3), "orange")],
    )
    yield Plot(title="Nodes that host a replica", unit="$/h", series=[_one("nodes", course.usd_per_hour, "green")])
    yield Plot(
        title="KV blocks in use", unit="%", series=[_one("KV", scaled(course.kv_share, lambda share: 100 * share), "purple")]
    )
    waiting = Series(name="waiting at gateways", values=course.queued, style="red")
    yield Plot(title="Requests in flight", unit="requests", series=[_one("in flight", course.in_flight, "blue"), waiting])


def _one(name: str, values: Sequence[float | None], style: str) -> Series:
    return Series(name=name, values=values, style=f"{style}-fill", area=True)


def _latency(title: str, unit: str, factor: float, values: Sequence[float | None], result: Result, bound: str) -> Plot:
    bounds = {name: getattr(found.slo, bound) for name, found in result.classes.items()}
    several = len({value for value in bounds.values() if value is not None}) > 1
    lines = [Bound(f"SLO {name if several else ''}".strip(), factor * value) for name, value in bounds.items() if value is not None]
    series = [Series(name=title, values=scaled(values, lambda value: factor * value), style="blue")]
    return Plot(title=title, unit=unit, series=series, bounds=lines if several else lines[:1])


def _replicas(counts: dict[str, list[float]]) -> Iterator[Series]:
    """By role, those that serve first."""
    order = ("ready", "draining", "warming", "starting", "lost")

    def place(name: str) -> tuple[int, int]:
        role, _, phase = name.partition(" ")
        return ROLES.index(role) if role in ROLES else len(ROLES), order.index(phase) if phase in order else len(order)

    for name in sorted(counts, key=place):
        role, _, phase = name.partition(" ")
        yield Series(name=name, values=counts[name], style=f"role-{role} phase-{phase}", area=True)


def _marks(result: Result) -> list[Mark]:
    acts = [Mark(act.at_s, f"{act.action}: {act.reason}", "act") for act in result.acts[:MOST_MARKS]]
    events = [
        Mark(event.at_s, f"{event.kind}: {event.what}", "grave" if event.kind in GRAVE else "event")
        for event in result.events[:MOST_MARKS]
    ]
    return acts + events


# Settings


def _believed(machine: Machine) -> Believed:
    spec, pace = machine.spec, machine.spec.pace
    low, high = limits_of(spec)
    replicas = f"{spec.count}" if low == high == spec.count else f"{spec.count}, {low} to {high}"
    hardware = "as calibrated" if pace is None else f"{machine.devices} x {accelerator(pace.accelerator).name}, {pace.shape}"
    if not isinstance(machine.true, StepTable):
        return Believed(
            group=machine.group, replicas=replicas, hardware=hardware, source="the roofline that the policies believe",
            error="none against it; against machines as in cluster/performance.py", derived="everything",
        )  # fmt: skip
    fit = machine.true.fit
    return Believed(
        group=machine.group, replicas=replicas, hardware=hardware, source=fit.source, error=_error(fit), derived=fit.derived
    )  # fmt: skip


def _error(fit: Fit) -> str:
    if not fit.points:
        return "not measured"
    said = f"mean {fit.mean_error:.1%}, largest {fit.largest_error:.1%} over {fit.points:,} points"
    if fit.held_out_mean_error is not None:
        said += f"; held out: mean {fit.held_out_mean_error:.1%} over {fit.held_out_points:,}"
    return said


def _world_yaml(world: World) -> str:
    """What of it is not the default, and then all."""
    plain, usual = msgspec.to_builtins(world), msgspec.to_builtins(World())
    differs = {name: value for name, value in plain.items() if value != usual[name]}
    rest = {name: value for name, value in plain.items() if name not in differs}
    parts = [
        f"# {words}\n{yaml.safe_dump(part, sort_keys=False)}"
        for words, part in (("given", differs), ("defaults", rest))
        if part
    ]  # fmt: skip
    return "\n".join(parts)
