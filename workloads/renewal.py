"""Requests that know nothing of each other: their gaps, lengths, prefixes and senders are each drawn on their own."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cluster.record import TraceRow
from workloads import arrivals
from workloads.chance import stream
from workloads.lengths import Empirical, Lengths
from workloads.population import Population
from workloads.prefixes import Prefixes


class Generator(msgspec.Struct, frozen=True, kw_only=True):
    """A renewal process with a rate that is piecewise constant."""

    steps: arrivals.Steps
    prompt: Lengths | Empirical
    output: Lengths | Empirical
    paired: bool = False
    """Whether a row's lengths are those of one row of the trace that both are drawn from."""
    burstiness: float = 1.0
    """As of `arrivals.arrivals`."""
    prefixes: Prefixes = Prefixes()
    population: Population = Population()

    @property
    def span_s(self) -> float:
        return arrivals.span_s(self.steps)

    def expected(self, until_s: float) -> float:
        """Requests that arrive before a time, on average."""
        return arrivals.expected_until(self.steps, until_s)

    def rows(self, seed: int) -> Iterator[TraceRow]:
        """The same rows for the same seed, in order of arrival."""
        prompts, outputs = (stream(seed, "lengths" if self.paired else concern) for concern in ("prompts", "outputs"))
        prefixes, senders = self.prefixes.drawing(seed), self.population.drawing(seed)
        for times_s in arrivals.arrivals(self.steps, self.burstiness, stream(seed, "arrivals")):
            count = len(times_s)
            prompt_tokens = self.prompt.draw(prompts, count)
            output_tokens = self.output.draw(outputs, count).tolist()
            hashes = prefixes.next(prompt_tokens)
            columns = (times_s.tolist(), prompt_tokens.tolist(), output_tokens, hashes, senders.next(count))
            for arrival_s, prompt, output, block_hashes, (tenant, slo_class, priority) in zip(*columns, strict=True):
                yield TraceRow(
                    arrival_s=arrival_s,
                    prompt_tokens=prompt,
                    output_tokens=output,
                    block_hashes=block_hashes,
                    tenant=tenant,
                    slo_class=slo_class,
                    priority=priority,
                )
