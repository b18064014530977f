"""How long an answer will be, as far as a gateway knows: the running mean of those it has seen end."""

from __future__ import annotations

EXPECTED_OUTPUT_TOKENS = 128  # Before anything was seen.
MEAN_WEIGHT = 0.05  # Of the newest request: the mean follows the last twenty or so.


class ExpectedOutput:
    """Of one model."""

    def __init__(self) -> None:
        self._tokens = float(EXPECTED_OUTPUT_TOKENS)

    def ended(self, tokens: int) -> None:
        """A request has completed with so many."""
        self._tokens += MEAN_WEIGHT * (tokens - self._tokens)

    def of(self, left: int) -> int:
        """Of a request that may have at most `left` >= 1 more; at least 1."""
        return min(left, round(self._tokens) or 1)
