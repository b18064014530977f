"""Cuts a window out of a trace and scales it, so that a big fleet's traffic fits a small one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from cluster.record import TraceRow


def window(rows: Iterable[TraceRow], start_s: float, span_s: float | None) -> Iterator[TraceRow]:
    """Of rows in order of arrival those in [start_s, start_s + span_s), rebased so that start_s is 0; reads no further."""
    end_s = float("inf") if span_s is None else start_s + span_s
    for row in rows:
        if row.arrival_s >= end_s:
            return
        if row.arrival_s >= start_s:
            yield msgspec.structs.replace(row, arrival_s=row.arrival_s - start_s) if start_s else row


class Scale(msgspec.Struct, frozen=True, kw_only=True):
    """Factors and bounds for each row. Blocks shrink with their prompt, so that the shared part of prompts stays the same."""

    prompt: float = 1.0
    output: float = 1.0
    rate: float = 1.0
    """2.0 lets the same requests arrive twice as fast."""
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None

    def __str__(self) -> str:
        """What a report must say of it."""
        said = [
            f"{name} x {factor:g}"
            for name, factor in (("prompts", self.prompt), ("outputs", self.output), ("rate", self.rate))
            if factor != 1
        ]
        bounds = (("prompts", self.max_prompt_tokens), ("outputs", self.max_output_tokens))
        said += [f"{name} of at most {bound} tokens" for name, bound in bounds if bound is not None]
        return ", ".join(said) or "as recorded"

    def __call__(self, row: TraceRow) -> TraceRow:
        return msgspec.structs.replace(
            row,
            arrival_s=row.arrival_s / self.rate,
            prompt_tokens=_scaled(row.prompt_tokens, self.prompt, self.max_prompt_tokens),
            output_tokens=_scaled(row.output_tokens, self.output, self.max_output_tokens),
            block_tokens=max(1, round(row.block_tokens * self.prompt)),
        )


def _scaled(tokens: int, factor: float, bound: int | None) -> int:
    scaled = max(1, round(tokens * factor))
    return scaled if bound is None else min(scaled, bound)
