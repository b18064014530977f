"""Step times and watts of one replica as measured: piecewise linear where a `PerformanceModel` is affine, with where it was fitted.

A table bends where machines do: a batch that outgrows the memory bus, prompts beyond a kernel's best size. It says what it was
fitted to and how well, so that whoever asks beyond that can be warned. What it leaves out: everything that is not a function
of prompt tokens, pairs, decoding sequences and their KV tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from cluster.errors import InvalidConfig
from cluster.least_squares import non_negative
from cluster.performance import MAX_STEPS, PerformanceModel, causal_pairs
from cluster.piecewise import Knots, check_knots, segments, value_at

SCHEMA = 1
AFFINE_POINTS = 9  # Places along each axis, evenly spaced in the logarithm, at which an affine model is held against a table.
Bounds = tuple[float, float]
USUAL_PROMPTS: Bounds = (1.0, 8192.0)  # As engines take them: tokens, sequences, and 2048 tokens of context each.
USUAL_BATCHES: Bounds = (1.0, 256.0)
USUAL_KV: Bounds = (1.0, 524_288.0)


class Fit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a table comes from, how far it is right, and where it was looked at. Errors are relative: 0.03 is 3 %."""

    source: str
    """Which data, and of which paper and section."""
    points: int
    """Measurements that it was fitted to; 0 where it was fitted to none."""
    mean_error: float
    largest_error: float
    """Over the fitted points, of seconds."""
    held_out: str = ""
    """Which points were kept from a second fit to judge it by; empty where none were."""
    held_out_points: int = 0
    held_out_mean_error: float | None = None
    held_out_largest_error: float | None = None
    prefill_tokens: Bounds
    """Least and most prompt tokens of a step among the points; likewise below. (0, 0): no point had any."""
    sequences: Bounds
    kv_tokens: Bounds
    hardware: str
    model: str
    tensor_parallel: int = 1
    derived: str = ""
    """Not empty: what of the table was not measured, and how it was had instead."""

    def __post_init__(self) -> None:
        for name in ("prefill_tokens", "sequences", "kv_tokens"):
            low, high = getattr(self, name)
            if not 0.0 <= low <= high < math.inf:
                raise InvalidConfig(f"fit.{name} [{low}, {high}] is no range of numbers from 0 up")
        for name in ("mean_error", "largest_error"):
            if not 0.0 <= (error := getattr(self, name)) < math.inf:
                raise InvalidConfig(f"fit.{name} {error} is outside [0, infinity)")


class StepTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds and watts of one replica, from the features of a step.

    A step that computes `p` prompt tokens, attending to `a` (token, context) pairs, and one token each for `b` decoding
    sequences with `k` KV tokens in all lasts
        step_s + prefill(p) + a * prefill_pair_s + decode(b) + kv(k).
    `mixed_factor` replaces this where p and b are both above 0. All functions go on linearly beyond their last knot. Raises
    InvalidConfig naming the field for knots that do not rise, do not begin at (0, 0), or fall.
    """

    step_s: float
    """Part of every step that computes anything, >= 0."""
    prefill: Knots
    """(prompt tokens in the step, seconds beyond step_s)."""
    prefill_pair_s: float = 0.0
    """Per (token, context) pair; see `causal_pairs`."""
    decode: Knots
    """(decoding sequences, seconds beyond step_s)."""
    kv: Knots = ((0.0, 0.0), (1.0, 0.0))
    """(KV tokens summed over decoding sequences, seconds)."""
    mixed_factor: float | None = None
    """None: a step with prompts and decodes lasts the sum of its parts. Else that many times, >= 1, what a step of prompts with
    as many tokens in all would last (Splitwise's simulator: 1.1)."""
    idle_w: float = 0.0
    prefill_w: float = 0.0
    """During the prompt part of a step."""
    decode_w: Knots = ((0.0, 0.0), (1.0, 0.0))
    """(decoding sequences, watts) during the rest of a step. May begin above 0, and fall."""
    fit: Fit

    def __post_init__(self) -> None:
        for name in ("step_s", "prefill_pair_s", "idle_w", "prefill_w"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise InvalidConfig(f"{name} {value} is outside [0, infinity)")
        if self.mixed_factor is not None and not 1.0 <= self.mixed_factor < math.inf:
            raise InvalidConfig(f"mixed_factor {self.mixed_factor} is outside [1, infinity)")
        for name, knots in {"prefill": self.prefill, "decode": self.decode, "kv": self.kv}.items():
            check_knots(name, knots)
        check_knots("decode_w", self.decode_w, from_zero=False, rising=False)

    def step_time_s(self, prefill_tokens: int, prefill_pairs: int, sequences: int, kv_tokens: int) -> float:
        """Seconds of one step. `prefill_pairs`: see `causal_pairs`; `kv_tokens`: summed over the decoding sequences."""
        if not prefill_tokens:
            return self.decode_step_s(sequences, kv_tokens)
        if sequences and self.mixed_factor is not None:
            return self.mixed_factor * self.step_time_s(prefill_tokens + sequences, prefill_pairs, 0, 0)
        prompts_s = self.step_s + value_at(self.prefill, prefill_tokens) + prefill_pairs * self.prefill_pair_s
        if not sequences:
            return prompts_s
        return prompts_s + value_at(self.decode, sequences) + value_at(self.kv, kv_tokens)

    def prefill_s(self, tokens: int, cached_tokens: int = 0) -> float:
        """Seconds to compute a prompt of `tokens`, of which the first `cached_tokens` have their KV, in one step."""
        return self.step_time_s(tokens - cached_tokens, causal_pairs(cached_tokens, tokens - cached_tokens), 0, 0)

    def decode_step_s(self, batch: int, kv_tokens: int) -> float:
        """Seconds of one decode step; piecewise affine in `kv_tokens` for a given batch."""
        return self.step_s + value_at(self.decode, batch) + value_at(self.kv, kv_tokens)

    def decode_span_s(self, batch: int, kv_tokens: int, steps: int) -> float:
        """Seconds of `steps` decode steps in a row; each leaves `batch` more KV tokens to the next."""
        fixed_s = self.step_s + value_at(self.decode, batch)
        return math.fsum(
            count * (fixed_s + first_s) + (count * (count - 1) // 2) * growth_s
            for count, first_s, growth_s in segments(self.kv, kv_tokens, batch, steps)
        )

    def decode_steps_within(self, batch: int, kv_tokens: int, seconds: float) -> int:
        """Most steps whose `decode_span_s` is at most `seconds` >= 0; never above MAX_STEPS."""
        steps = self._steps_near(batch, kv_tokens, seconds)
        while steps > 0 and self.decode_span_s(batch, kv_tokens, steps) > seconds:
            steps -= 1
        while steps < MAX_STEPS and self.decode_span_s(batch, kv_tokens, steps + 1) <= seconds:
            steps += 1
        return steps

    def power_w(self, prefill_tokens: int, prefill_pairs: int, sequences: int, kv_tokens: int) -> float:
        """Watts during such a step, its parts weighted by their time; `idle_w` where it computes nothing.

        A step of prompts alone is prompt part throughout, one of decodes alone has none; in one of both, prompts take what they
        add to a step.
        """
        if prefill_tokens == 0:
            return value_at(self.decode_w, sequences) if sequences else self.idle_w
        if sequences == 0:
            return self.prefill_w
        lasting_s = self.step_time_s(prefill_tokens, prefill_pairs, sequences, kv_tokens)
        prompts_s = value_at(self.prefill, prefill_tokens) + prefill_pairs * self.prefill_pair_s
        share = prompts_s / lasting_s if lasting_s > 0.0 else 1.0
        return share * self.prefill_w + (1.0 - share) * value_at(self.decode_w, sequences)

    def scaled(self, speedup: float) -> StepTable:
        """The same machine `speedup` > 0 times as fast, at the same watts."""
        return self.stretched(prefill=1.0 / speedup, decode=1.0 / speedup)

    def stretched(self, *, prefill: float, decode: float) -> StepTable:
        """Prompt parts `prefill` times as long, and all else, `step_s` included, `decode` times."""
        return msgspec.structs.replace(
            self,
            step_s=self.step_s * decode,
            prefill=_times(self.prefill, prefill),
            prefill_pair_s=self.prefill_pair_s * prefill,
            decode=_times(self.decode, decode),
            kv=_times(self.kv, decode),
        )

    def affine(self) -> PerformanceModel:
        """The nearest affine model: non-negative least squares of relative error over the fitted domain, on a grid.

        `affine_error` says how near it is. Its watts are the table's for prompts and for the smallest fitted batch.
        """
        shapes = list(_grid(self.fit))
        seconds = np.array([self.step_time_s(*shape) for shape in shapes])
        if not seconds.all():
            return self._watts(PerformanceModel(step_s=0.0, prefill_token_s=0.0))
        step_s, token_s, pair_s, sequence_s, kv_s = non_negative(np.array([(1, *shape) for shape in shapes], float), seconds)
        return self._watts(
            PerformanceModel(step_s=step_s, prefill_token_s=token_s, prefill_pair_s=pair_s, sequence_s=sequence_s, kv_token_s=kv_s)
        )

    def affine_error(self) -> tuple[float, float]:
        """Mean and largest relative error of `affine` against this table over the same grid."""
        model, shapes = self.affine(), list(_grid(self.fit))
        told = [(model.step_time_s(*shape), self.step_time_s(*shape)) for shape in shapes]
        errors = [abs(affine_s / table_s - 1) for affine_s, table_s in told if table_s > 0.0]
        return (math.fsum(errors) / len(errors), max(errors)) if errors else (0.0, 0.0)

    def _watts(self, model: PerformanceModel) -> PerformanceModel:
        decode_w = value_at(self.decode_w, self.fit.sequences[0] or 1.0)
        return msgspec.structs.replace(model, idle_w=self.idle_w, prefill_w=self.prefill_w, decode_w=decode_w)

    def _steps_near(self, batch: int, kv_tokens: int, seconds: float) -> int:
        """`decode_steps_within` but for rounding: whole segments while they fit, then the root of the next one's parabola."""
        fixed_s, steps = self.step_s + value_at(self.decode, batch), 0
        for count, first_s, growth_s in segments(self.kv, kv_tokens, batch, MAX_STEPS):
            lasting_s = count * (fixed_s + first_s) + (count * (count - 1) // 2) * growth_s
            if lasting_s > seconds:
                return steps + _whole_steps(fixed_s + first_s, growth_s, seconds)
            steps += count
            seconds -= lasting_s
        return steps


def _whole_steps(first_s: float, growth_s: float, seconds: float) -> int:
    """Most terms n with n first + n (n - 1) / 2 growth <= seconds, where not all terms are 0."""
    # The positive root of growth/2 n^2 + linear n = seconds, in whichever form does not cancel.
    linear = first_s - growth_s / 2
    discriminant = math.sqrt(linear * linear + 2 * growth_s * max(seconds, 0.0))
    root = 2 * max(seconds, 0.0) / (linear + discriminant) if linear > 0.0 else (discriminant - linear) / growth_s
    return math.floor(min(root, MAX_STEPS))


def _times(knots: Knots, factor: float) -> Knots:
    return tuple((place, value * factor) for place, value in knots)


def _grid(fit: Fit) -> Iterator[tuple[int, int, int, int]]:
    """Whole prompts, and decode batches with contexts that fit its domain: arguments of `step_time_s`.

    Where a domain is empty, as that of prompts whose times were derived, the usual one stands in.
    """
    prompts, batches, kept = (
        ours if ours[1] else usual
        for ours, usual in (
            (fit.prefill_tokens, USUAL_PROMPTS),
            (fit.sequences, USUAL_BATCHES),
            (fit.kv_tokens, USUAL_KV),
        )
    )
    longest = max(prompts[1], kept[1] / batches[1])
    for tokens in _spread(prompts):
        yield tokens, causal_pairs(0, tokens), 0, 0
    for sequences in _spread(batches):
        for kv_tokens in _spread(kept):
            if sequences <= kv_tokens <= sequences * longest:
                yield 0, 0, sequences, kv_tokens


def _spread(bounds: Bounds) -> list[int]:
    low, high = max(1.0, bounds[0]), bounds[1]
    return sorted({round(place) for place in np.geomspace(low, high, AFFINE_POINTS)})


def step_table_of(model: PerformanceModel, *, fit: Fit | None = None) -> StepTable:
    """The table with the same times as an affine model, to the last bit.

    Its watts are the model's for prompts, and for decode batches of a thousand tokens of context each, at powers of two.
    """
    last_s = model.step_time_s(0, 0, 1024, 1024 * 1000)
    batches = [2**power for power in range(11)]
    fixed_w = model.decode_w if last_s > 0.0 else model.prefill_w
    return StepTable(
        step_s=model.step_s,
        prefill=((0.0, 0.0), (1.0, model.prefill_token_s)),
        prefill_pair_s=model.prefill_pair_s,
        decode=((0.0, 0.0), (1.0, model.sequence_s)),
        kv=((0.0, 0.0), (1.0, model.kv_token_s)),
        idle_w=model.idle_w,
        prefill_w=model.prefill_w,
        decode_w=flat_beyond(((0.0, fixed_w), *((float(b), model.power_w(0, 0, b, 1000 * b)) for b in batches))),
        fit=fit or AFFINE_FIT,
    )


def flat_beyond(knots: Knots) -> Knots:
    """With one more knot, so that the function stays where it is beyond the last: watts do not grow for ever."""
    return (*knots, (knots[-1][0] + 1.0, knots[-1][1]))


AFFINE_FIT = Fit(
    source="an affine model, taken over as it is",
    points=0,
    mean_error=0.0,
    largest_error=0.0,
    prefill_tokens=USUAL_PROMPTS,
    sequences=USUAL_BATCHES,
    kv_tokens=USUAL_KV,
    hardware="",
    model="",
    derived="not measured: an affine model's own times",
)
"""Of a model that says nothing of where it holds: prompts and batches as engines take them."""


def outside(
    fit: Fit, *, prompt_tokens: float | None = None, sequences: float | None = None, kv_tokens: float | None = None
) -> str | None:
    """What of a question lies outside the fitted domain, in words, and where the domain ends; None where nothing does."""
    asked = (
        ("prompt tokens in a step", prompt_tokens, fit.prefill_tokens),
        ("decoding sequences", sequences, fit.sequences),
        ("KV tokens", kv_tokens, fit.kv_tokens),
    )
    told = [
        f"{value:g} {what} {'below' if value < low else 'above'} {low if value < low else high:g}"
        for what, value, (low, high) in asked
        if value is not None and not low <= value <= high
    ]
    if not told:
        return None
    return f"{', '.join(told)}: outside of where {fit.model} on {fit.tensor_parallel} x {fit.hardware} was fitted ({fit.source})"


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema: int
    table: StepTable


def read_table(path: Path | str) -> StepTable:
    """A table written by `write_table`. Raises InvalidConfig naming file, field, value and bound."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise InvalidConfig(f"{path}: no step table can be read there: {error.strerror}") from error
    try:
        schema = msgspec.json.decode(raw, type=_Schema).schema
        if schema != SCHEMA:
            raise InvalidConfig(f"schema {schema} is not {SCHEMA}, the one that this version reads")
        return msgspec.json.decode(raw, type=_File).table
    except (msgspec.DecodeError, InvalidConfig) as error:
        raise InvalidConfig(f"{path}: {error}") from error


def write_table(path: Path | str, table: StepTable) -> None:
    """One JSON object, for `read_table` and for people. Raises InvalidConfig where it cannot be written."""
    try:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(_File(schema=SCHEMA, table=table)), indent=2) + b"\n")
    except OSError as error:
        raise InvalidConfig(f"{path}: no step table can be written there: {error.strerror}") from error


class _Schema(msgspec.Struct, frozen=True):
    schema: int
