"""A sweep: variants of one run, each over the same seeds. The file that says which, and the table of what came of them.

A variant is a list of settings by their dotted path, `fleet.replicas[0].count: 4`, over what the whole sweep has in common; `fleet`
and `world` themselves name other files. Seeds draw what a generator makes and what the world does; a trace file's requests are the
same under every seed, and then the intervals are over the world's chance alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet
from controller.config import check, load_fleet, parse_fleet
from controller.config.reading import decoded, named, read_config
from controller.spelling import did_you_mean
from simulator.case import Case, Traffic
from simulator.interval import Interval, interval
from simulator.outcome import METRICS, Outcome
from simulator.world import World
from simulator.world_file import load_world
from workloads.generators import is_generator

MAX_RUNS = 100_000
BASE = "base"
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")

Plain = dict[str, Any]


class SweepFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A sweep.yaml. Relative paths in it are taken from its own directory, but those inside a generator's text."""

    workload: Traffic
    fleet: str
    """A cluster.yaml."""
    world: str | None = None
    """A file of world settings; None is the world by default."""
    seeds: Annotated[int, msgspec.Meta(ge=1)] = 5
    """0, 1, 2 and so on."""
    warm_up_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    control: bool = True
    variants: dict[str, dict[str, Any]] = msgspec.field(default_factory=lambda: {BASE: {}})


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Of one variant over its seeds."""

    variant: str
    runs: int
    metrics: dict[str, Interval]
    """By field; a metric that some run does not have is left out."""


def load_sweep(path: Path) -> dict[str, list[Case]]:
    """Cases by variant. Raises InvalidConfig with the value, its bound and its place."""
    data, base = read_config(path), path.absolute().parent
    with named(path):
        sweep = decoded(data, SweepFile)
        if not sweep.variants:
            raise InvalidConfig(f"variants is empty; leave it out for one of no changes, {BASE}")
        common = {
            "workload": _plain(seen_from(sweep.workload, base)),
            "fleet": _plain(load_fleet(base / sweep.fleet)),
            "world": _plain(World() if sweep.world is None else load_world(base / sweep.world)),
            "run": {"warm_up_s": sweep.warm_up_s, "control": sweep.control},
        }
        found = {}
        for name, changes in sweep.variants.items():
            try:
                found[name] = over_seeds(_case(common, changes, base), sweep.seeds)
            except InvalidConfig as error:
                raise InvalidConfig(f"variants.{name}: {error}") from error
        check_size(found)
        return found


def over_seeds(case: Case, seeds: int) -> list[Case]:
    """The same case under seeds 0, 1, 2 and so on."""
    return [msgspec.structs.replace(case, seed=seed) for seed in range(seeds)]


def check_size(cases: Mapping[str, Sequence[Case]]) -> None:
    runs = sum(map(len, cases.values()))
    if runs > MAX_RUNS:
        raise InvalidConfig(f"{runs} runs are above {MAX_RUNS}, the most of one sweep")


def seen_from(traffic: Traffic, base: Path) -> Traffic:
    """With the trace's path absolute."""
    if is_generator(traffic.trace):
        return traffic
    return msgspec.structs.replace(traffic, trace=str(base / Path(traffic.trace).expanduser()))


def summarise(variant: str, outcomes: Sequence[Outcome]) -> Summary:
    """Of at least one outcome."""
    metrics = {}
    for metric in METRICS:
        values = [getattr(outcome, metric.field) for outcome in outcomes]
        if None not in values:
            metrics[metric.field] = interval(values)
    return Summary(variant=variant, runs=len(outcomes), metrics=metrics)


# Variants


def _case(common: Plain, changes: Mapping[str, Any], base: Path) -> Case:
    plain = copy.deepcopy(common)  # Changes of one variant are no other's.
    for path in sorted(changes, key=lambda path: "." in path or "[" in path):  # Whole files first, then settings in them.
        value = changes[path]
        if path in ("fleet", "world"):
            plain[path] = _plain(_file(path, value, base))
        else:
            _set(plain, path, value)
    fleet = _fleet(plain["fleet"], base)
    check(fleet, files=False)
    traffic = seen_from(_converted("workload", plain["workload"], Traffic), base)
    world = _converted("world", plain["world"], World)
    return _converted("run", plain["run"], _Run).case(fleet, world, traffic)


class _Run(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    warm_up_s: Annotated[float, msgspec.Meta(ge=0)]
    control: bool

    def case(self, fleet: Fleet, world: World, traffic: Traffic) -> Case:
        return Case(fleet=fleet, world=world, traffic=traffic, warm_up_s=self.warm_up_s, control=self.control)


def _plain(settings: msgspec.Struct) -> Plain:
    """As a file has them: lists for tuples."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(settings))


def _file(kind: str, value: object, base: Path) -> Fleet | World:
    if not isinstance(value, str):
        raise InvalidConfig(f"{kind} {value!r} is no path of a file; a setting in it is `{kind}.name: value`")
    return load_fleet(base / value) if kind == "fleet" else load_world(base / value)


def _fleet(plain: Plain, base: Path) -> Fleet:
    try:
        return parse_fleet(yaml.safe_dump(plain).encode(), base)
    except InvalidConfig as error:
        raise InvalidConfig(f"fleet: {error}") from error


def _converted(place: str, plain: Plain, kind: Any) -> Any:
    try:
        return decoded(yaml.safe_dump(plain).encode(), kind)
    except InvalidConfig as error:
        raise InvalidConfig(f"{place}: {error}") from error


def _set(plain: Plain, path: str, value: Any) -> None:
    """Set what a dotted path names. What stands before its last step must be there. Raises InvalidConfig."""
    *before, last = _steps(path)
    place: Any = plain
    for step in before:
        place = _inside(place, step, path)
    if isinstance(last, int) or place is plain:
        _inside(place, last, path)
    if not isinstance(place, dict | list):
        raise InvalidConfig(f"{path}: {place!r} has no settings of its own")
    place[last] = value


def _steps(path: str) -> list[str | int]:
    found = list(_STEP.finditer(path))
    if not found or "".join(match[0] for match in found) != path:
        raise InvalidConfig(f"{path!r} is no path such as fleet.replicas[0].count")
    return [int(match[2]) if match[2] else match[1] for match in found]


def _inside(place: Any, step: str | int, path: str) -> Any:
    if isinstance(step, int):
        if not isinstance(place, list) or step >= len(place):
            bound = f"a list of {len(place)}" if isinstance(place, list) else "no list"
            raise InvalidConfig(f"{path}: [{step}] is outside {bound}")
        return place[step]
    if not isinstance(place, dict) or step not in place:
        known = list(place) if isinstance(place, dict) else []
        raise InvalidConfig(f"{path}: there is no {step!r}{did_you_mean(step, known)}")
    return place[step]
