"""Makes traffic up from stated distributions and a seed: what a command line calls it, and what it must not say.

    poisson:rate=4,minutes=2,prompt=lognormal(200,0.6),output=fixed(32)
    gamma:rate=4,burstiness=0.25,minutes=2,prompt=uniform(50,400),output=lognormal(60,0.5,16,128)
    steps:rates=2x40/8x40/2x40,prompt=fixed(200),output=fixed(32),shared=0.5,prefix=64
    diurnal:low=2,high=10,hours=48,lengths=azure_conv.csv,tenants=a:3/b:1
    sessions:rate=0.5,minutes=60,turns=geometric(5),think=lognormal(30,0.8),prompt=lognormal(80,0.6),output=fixed(120),system=512

When: rates are requests per second, those of `sessions` conversations per second; `steps` are rate x seconds; `diurnal` swings
from `low` to `high` and back in each `period_h` hours (24). `burstiness` is the shape of gamma distributed gaps, 1 being Poisson.
How long: `fixed(tokens)`, `uniform(low,high)`, `lognormal(median,sigma)` or `geometric(mean)`, the latter two with an optional
`,low,high` to clip to. In place of prompt and output, `lengths` names a trace file to draw both from, each on its own, or with
`independent=no` both from one row.
What is shared: `shared` is the share of requests that open with one of `prefixes` (1) common prefixes of `prefix` (64) tokens.
In `sessions`, `prompt` is each turn's new message, sent after all that was said before; `turns` is how many there are, `think` the
seconds from one to the next, also `exponential(mean)`; each opens with one of `prefixes` system prompts of `system` (0) tokens and
ends before a turn that does not fit into `context` (131072) tokens.
Whose: `tenants=a:3/b:1`, `classes=interactive:3/batch:1` (SLO classes) and `priorities=0:9/5:1` are values and their weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from cluster.errors import InvalidConfig, InvalidTrace
from cluster.kv import BLOCK_TOKENS
from cluster.request import MAX_PRIORITY
from workloads import arrivals
from workloads.lengths import Empirical, Lengths, Waits, lengths_of
from workloads.population import Population, Shares
from workloads.prefixes import Prefixes
from workloads.renewal import Generator
from workloads.sessions import Sessions
from workloads.traces import MAX_SPAN_S, MAX_TOKENS

MAX_ROWS = 1_000_000_000  # A day's work of a simulator that takes 12,000 requests a second; more is a slip of the pen.
MAX_RATE = 1e6
MAX_STEPS = 1_000_000  # Two years of minutes.
MAX_TURNS = 10_000
MAX_SHARES = 10_000
MAX_SIGMA = 10.0  # A third of the values are further than a factor of 22,000 from the median.
MAX_NAME_CHARS = 64

_Fields = dict[str, str]
_SENDERS = {"tenants", "classes", "priorities"}
_LENGTHS = {"prompt", "output", "lengths", "independent"}
_SHARED = {"shared", "prefix", "prefixes"}
_NEEDED = {
    "poisson": {"rate", "minutes"},
    "gamma": {"rate", "minutes", "burstiness"},
    "steps": {"rates"},
    "diurnal": {"low", "high", "hours"},
    "sessions": {"rate", "minutes", "turns", "think", "prompt", "output"},
}
_OPTIONAL = {
    "poisson": _LENGTHS | _SHARED | _SENDERS,
    "gamma": _LENGTHS | _SHARED | _SENDERS,
    "steps": _LENGTHS | _SHARED | _SENDERS | {"burstiness"},
    "diurnal": _LENGTHS | _SHARED | _SENDERS | {"burstiness", "period_h"},
    "sessions": _SENDERS | {"system", "prefixes", "context"},
}
_FIELD = re.compile(r"(\w+)=((?:[^,()]|\([^()]*\))+)(?:,|$)")
_DRAWN = re.compile(r"(\w+)\(([^()]*)\)")
_ARGUMENTS = {"fixed": (1,), "uniform": (2,), "lognormal": (2, 4), "geometric": (1, 3)}
_WAIT_ARGUMENTS = {"fixed": (1,), "uniform": (2,), "lognormal": (2,), "exponential": (1,)}


def is_generator(text: str) -> bool:
    """Whether a command line argument is a generator and not a file."""
    return text.partition(":")[0] in _NEEDED and ":" in text


def parse_generator(text: str) -> Generator | Sessions:
    """What the text names. Raises InvalidConfig."""
    kind, _, rest = text.partition(":")
    if kind not in _NEEDED:
        raise InvalidConfig(f"generator {kind!r} is none of {', '.join(_NEEDED)}")
    fields = _fields(kind, rest)
    generator = _sessions(fields) if kind == "sessions" else _renewal(kind, fields)
    requests = arrivals.expected_until(generator.steps, generator.span_s)
    requests *= generator.turns.mean if isinstance(generator, Sessions) else 1.0
    if requests > MAX_ROWS:
        raise InvalidConfig(f"{text!r} makes about {requests:.0f} requests, above {MAX_ROWS}")
    if generator.span_s > MAX_SPAN_S:
        raise InvalidConfig(f"{text!r} lasts {generator.span_s:g} s, above {MAX_SPAN_S:g}")
    return generator


def _fields(kind: str, rest: str) -> _Fields:
    fields: _Fields = {}
    at = 0
    while at < len(rest):
        if not (found := _FIELD.match(rest, at)):
            raise InvalidConfig(f"{rest[at:]!r} in generator {kind!r} is not name=value,...")
        if found[1] in fields:
            raise InvalidConfig(f"generator {kind!r} has {found[1]} twice")
        fields[found[1]] = found[2].strip()
        at = found.end()
    _check_names(kind, fields)
    return fields


def _check_names(kind: str, fields: _Fields) -> None:
    known, needed = _NEEDED[kind] | _OPTIONAL[kind], set(_NEEDED[kind])
    if "lengths" not in fields:
        needed |= {"prompt", "output"}
    if unknown := sorted(fields.keys() - known):
        raise InvalidConfig(f"generator {kind!r} has no {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
    if missing := sorted(needed - fields.keys()):
        raise InvalidConfig(f"generator {kind!r} needs {', '.join(missing)}")
    if "lengths" in fields and (both := sorted(fields.keys() & {"prompt", "output"})):
        raise InvalidConfig(f"generator {kind!r} has lengths and also {', '.join(both)}")
    if "independent" in fields and "lengths" not in fields:
        raise InvalidConfig(f"generator {kind!r} has independent={fields['independent']} without lengths")


def _renewal(kind: str, fields: _Fields) -> Generator:
    if "lengths" in fields:
        prompt, output = _seen(fields["lengths"])
    else:
        prompt, output = _lengths("prompt", fields["prompt"]), _lengths("output", fields["output"])
    return Generator(
        steps=_steps(kind, fields),
        prompt=prompt,
        output=output,
        paired=not _yes("independent", fields.get("independent", "yes")),
        burstiness=_number("burstiness", fields.get("burstiness", "1"), 1e-3, 1e3),
        prefixes=Prefixes(
            share=_number("shared", fields.get("shared", "0"), 0, 1),
            tokens=_whole("prefix", fields.get("prefix", "64"), BLOCK_TOKENS, MAX_TOKENS),
            count=_whole("prefixes", fields.get("prefixes", "1"), 1, 1e6),
        ),
        population=_population(fields),
    )


def _sessions(fields: _Fields) -> Sessions:
    system = _whole("system", fields.get("system", "0"), 0, MAX_TOKENS)
    return Sessions(
        steps=_steps("sessions", fields),
        turns=_lengths("turns", fields["turns"], MAX_TURNS),
        think=_waits("think", fields["think"]),
        message=_lengths("prompt", fields["prompt"]),
        output=_lengths("output", fields["output"]),
        system_tokens=system,
        systems=_whole("prefixes", fields.get("prefixes", "1"), 1, 1e6),
        context_tokens=_whole("context", fields.get("context", "131072"), max(2, system + 1), MAX_TOKENS),
        population=_population(fields),
    )


# When


def _steps(kind: str, fields: _Fields) -> arrivals.Steps:
    match kind:
        case "steps":
            steps = fields["rates"].split("/")
            if len(steps) > MAX_STEPS:
                raise InvalidConfig(f"rates: {len(steps)} steps, above {MAX_STEPS}")
            return tuple(_step(step) for step in steps)
        case "diurnal":
            return _diurnal(fields)
        case _:
            return ((_number("rate", fields["rate"], 0, MAX_RATE), 60 * _number("minutes", fields["minutes"], 0, 1e6)),)


def _step(text: str) -> tuple[float, float]:
    rate, _, seconds = text.partition("x")
    return _number("rate of a step", rate, 0, MAX_RATE), _number("seconds of a step", seconds, 0, 1e7)


def _diurnal(fields: _Fields) -> arrivals.Steps:
    high = _number("high", fields["high"], 0, MAX_RATE)
    low = _number("low", fields["low"], 0, high)
    period_s = 3600 * _number("period_h", fields.get("period_h", "24"), 1e-3, 1e5)
    most_h = MAX_STEPS / arrivals.STEPS_A_PERIOD * period_s / 3600
    return arrivals.diurnal(low, high, period_s, 3600 * _number("hours", fields["hours"], 1e-3, most_h))


# How long


def _lengths(name: str, text: str, most: int = MAX_TOKENS) -> Lengths:
    kind, numbers = _distribution(name, text, _ARGUMENTS, 1.0, most)
    bounds = numbers[{"geometric": 1}.get(kind, 2) :] or (1.0, float(most))
    if bounds[0] > bounds[1]:
        raise InvalidConfig(f"{name}={text!r}: the lower bound is above the upper")
    second = numbers[1] if kind in ("uniform", "lognormal") else 0.0
    return Lengths(kind=kind, first=numbers[0], second=second, low=int(bounds[0]), high=int(bounds[1]))


def _waits(name: str, text: str) -> Waits:
    kind, numbers = _distribution(name, text, _WAIT_ARGUMENTS, 0.0, MAX_SPAN_S)
    return Waits(kind=kind, first=numbers[0], second=numbers[1] if len(numbers) > 1 else 0.0, high=MAX_SPAN_S)


def _distribution(
    name: str, text: str, known: dict[str, tuple[int, ...]], low: float, high: float
) -> tuple[str, tuple[float, ...]]:
    """Its kind and arguments: each in [low, high], but a sigma in [0, MAX_SIGMA]."""
    found = _DRAWN.fullmatch(text)
    if not found or found[1] not in known:
        raise InvalidConfig(f"{name}={text!r} is none of {', '.join(f'{kind}(...)' for kind in known)}")
    kind, arguments = found[1], found[2].split(",")
    if len(arguments) not in known[kind]:
        raise InvalidConfig(f"{name}={text!r} has {len(arguments)} arguments, {kind} takes {_either(known[kind])}")
    ranges = [(low, high)] * len(arguments)
    if kind == "lognormal":
        ranges[1] = (0.0, MAX_SIGMA)
    numbers = tuple(_number(f"{name}={text}", argument, *bounds) for argument, bounds in zip(arguments, ranges, strict=True))
    if kind == "uniform" and numbers[0] > numbers[1]:
        raise InvalidConfig(f"{name}={text!r}: the lower bound is above the upper")
    return kind, numbers


def _seen(path: str) -> tuple[Empirical, Empirical]:
    try:
        return lengths_of(path)
    except (InvalidTrace, InvalidConfig) as error:
        raise InvalidConfig(f"lengths: {error}") from error


# Whose


def _population(fields: _Fields) -> Population:
    return Population(
        tenants=_shares("tenants", fields.get("tenants", "default:1"), _name),
        classes=_shares("classes", fields.get("classes", "default:1"), _name),
        priorities=_shares("priorities", fields.get("priorities", "0:1"), _priority),
    )


def _shares(name: str, text: str, parse: Callable[[str, str], str | int]) -> Shares:
    parts = text.split("/")
    if len(parts) > MAX_SHARES:
        raise InvalidConfig(f"{name}: {len(parts)} values, above {MAX_SHARES}")
    split = [part.rpartition(":") for part in parts]
    pairs = [(parse(name, value), _number(f"{name}: weight of {value!r}", weight, 1e-9, 1e9)) for value, _, weight in split]
    values, weights = zip(*pairs, strict=True)
    if len(set(values)) < len(values):
        raise InvalidConfig(f"{name}={text!r} has a value twice")
    return Shares(values, weights)


def _name(field: str, text: str) -> str:
    if not 0 < len(text) <= MAX_NAME_CHARS:
        raise InvalidConfig(f"{field}: {text!r} is no name of 1 to {MAX_NAME_CHARS} characters before a colon and its weight")
    return text


def _priority(field: str, text: str) -> int:
    return _whole(field, text, -MAX_PRIORITY, MAX_PRIORITY)


# Numbers


def _yes(name: str, text: str) -> bool:
    if text not in ("yes", "no"):
        raise InvalidConfig(f"{name}: {text!r} is neither yes nor no")
    return text == "yes"


def _whole(name: str, text: str, low: float, high: float) -> int:
    value = _number(name, text, low, high)
    if value != int(value):
        raise InvalidConfig(f"{name}: {text} is no whole number")
    return int(value)


def _number(name: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InvalidConfig(f"{name}: {text!r} is not a number") from None
    if not low <= value <= high:
        raise InvalidConfig(f"{name}: {text} is outside [{low:g}, {high:g}]")
    return value


def _either(counts: tuple[int, ...]) -> str:
    return " or ".join(map(str, counts))
