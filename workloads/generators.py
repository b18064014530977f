"""Makes traffic up: arrivals, lengths and shared prefixes from stated distributions and a seed.

As text, for the command line:

    poisson:rate=4,minutes=2,prompt=lognormal(200,0.6),output=fixed(32)
    gamma:rate=4,burstiness=0.25,minutes=2,prompt=uniform(50,400),output=lognormal(60,0.5,16,128)
    steps:rates=2x40/8x40/2x40,prompt=fixed(200),output=fixed(32),shared=0.5,prefix=64

Rates are requests per second, `steps` are rate x seconds. `lognormal(median, sigma)` and an optional `low, high` to clip to.
`shared` is the share of requests that open with one of `prefixes` common prefixes of `prefix` tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

import msgspec

from cluster.errors import InvalidConfig
from cluster.kv import BLOCK_TOKENS
from cluster.record import TraceRow

MAX_LENGTH_TOKENS = 2**20
MAX_ROWS = 10_000_000


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """A distribution of lengths in tokens, clipped to [low, high]."""

    kind: str
    """fixed (first = tokens), uniform (first to second, both included) or lognormal (median first, sigma second)."""
    first: float
    second: float = 0.0
    low: int = 1
    high: int = MAX_LENGTH_TOKENS

    def draw(self, random: Random) -> int:
        match self.kind:
            case "fixed":
                tokens = round(self.first)
            case "uniform":
                tokens = random.randint(round(self.first), round(self.second))
            case _:
                tokens = round(self.first * random.lognormvariate(0.0, self.second))
        return min(max(tokens, self.low), self.high)


class Generator(msgspec.Struct, frozen=True, kw_only=True):
    """A renewal process whose rate is piecewise constant, with independent lengths."""

    steps: tuple[tuple[float, float], ...]
    """(requests per second >= 0, seconds > 0), one after the other."""
    prompt: Lengths
    output: Lengths
    burstiness: float = 1.0
    """Shape of the gamma distributed gaps: 1 is Poisson, below is burstier, above more even (as in vLLM's benchmark)."""
    shared: float = 0.0
    """Share of requests with a common prefix, in [0, 1]."""
    prefix_tokens: int = 0
    prefixes: int = 1

    @property
    def span_s(self) -> float:
        return sum(seconds for _, seconds in self.steps)

    def expected(self, until_s: float) -> float:
        """Requests that arrive before `until_s`, on average."""
        expected, start_s = 0.0, 0.0
        for rate, seconds in self.steps:
            expected += rate * min(max(0.0, until_s - start_s), seconds)
            start_s += seconds
        return expected

    def rows(self, seed: int) -> Iterator[TraceRow]:
        """The same rows for the same seed, in order of arrival."""
        random = Random(seed)
        common = [[random.getrandbits(64) for _ in range(self.prefix_tokens // BLOCK_TOKENS)] for _ in range(self.prefixes)]
        for arrival_s in self._arrivals(random):
            prompt_tokens = self.prompt.draw(random)
            yield TraceRow(
                arrival_s=round(arrival_s, 6),
                prompt_tokens=prompt_tokens,
                output_tokens=self.output.draw(random),
                block_hashes=self._hashes(prompt_tokens, common, random),
            )

    def _arrivals(self, random: Random) -> Iterator[float]:
        """Gaps of mean 1 in expected requests, stretched by the rate that holds (time rescaling)."""
        start_s, expected, target = 0.0, 0.0, self._gap(random)
        for rate, seconds in self.steps:
            while rate > 0 and target < expected + rate * seconds:
                yield start_s + (target - expected) / rate
                target += self._gap(random)
            start_s, expected = start_s + seconds, expected + rate * seconds

    def _gap(self, random: Random) -> float:
        return random.gammavariate(self.burstiness, 1.0 / self.burstiness)

    def _hashes(self, prompt_tokens: int, common: list[list[int]], random: Random) -> tuple[int, ...]:
        if self.shared == 0.0 or self.prefix_tokens < BLOCK_TOKENS:
            return ()
        blocks = prompt_tokens // BLOCK_TOKENS
        opening = random.choice(common)[:blocks] if random.random() < self.shared else []
        return (*opening, *(random.getrandbits(64) for _ in range(blocks - len(opening))))


# The text form

_KINDS = {"poisson": {"rate", "minutes"}, "gamma": {"rate", "minutes", "burstiness"}, "steps": {"rates"}}
_COMMON = {"prompt", "output", "shared", "prefix", "prefixes"}
_FIELD = re.compile(r"(\w+)=((?:[^,()]|\([^()]*\))+)(?:,|$)")
_LENGTHS = re.compile(r"(fixed|uniform|lognormal)\(([^()]*)\)")
_ARGUMENTS = {"fixed": (1,), "uniform": (2,), "lognormal": (2, 4)}


def is_generator(text: str) -> bool:
    """Whether a command line argument is a generator and not a file."""
    return text.partition(":")[0] in _KINDS and ":" in text


def parse_generator(text: str) -> Generator:
    """A Generator from its text form. Raises InvalidConfig."""
    kind, _, rest = text.partition(":")
    if kind not in _KINDS:
        raise InvalidConfig(f"generator {kind!r} is none of {', '.join(_KINDS)}")
    fields = _fields(kind, rest)
    if kind == "steps":
        steps = tuple(_step(step) for step in fields["rates"].split("/"))
    else:
        steps = ((_number("rate", fields["rate"], 0, 1e6), 60 * _number("minutes", fields["minutes"], 0, 1e6)),)
    generator = Generator(
        steps=steps,
        prompt=_lengths("prompt", fields["prompt"]),
        output=_lengths("output", fields["output"]),
        burstiness=_number("burstiness", fields.get("burstiness", "1"), 1e-3, 1e3),
        shared=_number("shared", fields.get("shared", "0"), 0, 1),
        prefix_tokens=int(_number("prefix", fields.get("prefix", "64"), BLOCK_TOKENS, MAX_LENGTH_TOKENS)),
        prefixes=int(_number("prefixes", fields.get("prefixes", "1"), 1, 1e6)),
    )
    if (expected := sum(rate * seconds for rate, seconds in steps)) > MAX_ROWS:
        raise InvalidConfig(f"{text!r} makes about {expected:.0f} requests, above {MAX_ROWS}")
    return generator


def _fields(kind: str, rest: str) -> dict[str, str]:
    fields, at = {}, 0
    while at < len(rest):
        if not (found := _FIELD.match(rest, at)):
            raise InvalidConfig(f"{rest[at:]!r} in generator {kind!r} is not name=value,...")
        fields[found[1]] = found[2].strip()
        at = found.end()
    known, needed = _KINDS[kind] | _COMMON, _KINDS[kind] | {"prompt", "output"}
    if unknown := sorted(fields.keys() - known):
        raise InvalidConfig(f"generator {kind!r} has no {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
    if missing := sorted(needed - fields.keys()):
        raise InvalidConfig(f"generator {kind!r} needs {', '.join(missing)}")
    return fields


def _step(text: str) -> tuple[float, float]:
    rate, _, seconds = text.partition("x")
    return _number("rate of a step", rate, 0, 1e6), _number("seconds of a step", seconds, 0, 1e7)


def _lengths(name: str, text: str) -> Lengths:
    found = _LENGTHS.fullmatch(text)
    if not found:
        raise InvalidConfig(f"{name}={text!r} is none of fixed(tokens), uniform(low,high), lognormal(median,sigma[,low,high])")
    kind, arguments = found[1], found[2].split(",")
    if len(arguments) not in _ARGUMENTS[kind]:
        raise InvalidConfig(f"{name}={text!r} has {len(arguments)} arguments, {kind} takes {_ARGUMENTS[kind]}")
    first = _number(f"{name}={text}: {arguments[0]!r}", arguments[0], 1, MAX_LENGTH_TOKENS)
    second = _number(f"{name}={text}", arguments[1], 0, MAX_LENGTH_TOKENS) if len(arguments) > 1 else 0.0
    low, high = (
        int(_number(f"{name}={text}", each, 1, MAX_LENGTH_TOKENS)) for each in arguments[2:] or ("1", str(MAX_LENGTH_TOKENS))
    )
    if low > high or (kind == "uniform" and first > second):
        raise InvalidConfig(f"{name}={text!r}: the lower bound is above the upper")
    return Lengths(kind=kind, first=first, second=second, low=low, high=high)


def _number(name: str, text: str | float, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InvalidConfig(f"{name}: {text!r} is not a number") from None
    if not low <= value <= high:
        raise InvalidConfig(f"{name}: {text} is outside [{low:g}, {high:g}]")
    return value
