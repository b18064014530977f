"""What was promised, what a request took, and whether it kept the promise."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on a request's latency, in seconds. A bound of None always holds."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


class RequestTiming(msgspec.Struct, frozen=True, kw_only=True):
    """What a client saw of one request. Times in seconds on one clock, which need not be the wall clock."""

    arrival_s: float
    first_token_s: float | None
    last_token_s: float | None
    output_tokens: int
    itl_s: tuple[float, ...] = ()
    """Gaps between tokens, in order; empty where they were not recorded."""
    error: str | None = None

    @property
    def completed(self) -> bool:
        return self.error is None and self.first_token_s is not None

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first; None with fewer than two tokens."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        """Arrival to last token."""
        return None if self.last_token_s is None else self.last_token_s - self.arrival_s


def meets(timing: RequestTiming, slo: Slo) -> bool:
    """Whether a request completed inside its whole SLO. A request of one token has no TPOT to miss."""
    if not timing.completed:
        return False
    pairs = ((timing.ttft_s, slo.ttft_s), (timing.tpot_s, slo.tpot_s), (timing.e2e_s, slo.e2e_s))
    return all(bound is None or value is None or value <= bound for value, bound in pairs)


def goodput_rps(timings: Iterable[RequestTiming], slo: Slo, span_s: float) -> float:
    """Requests per second that met their whole SLO over a span of `span_s` > 0 seconds (DistServe, OSDI'24, section 2)."""
    return sum(meets(timing, slo) for timing in timings) / span_s
