"""One line of the table of reproductions: what was published, what we find, and whether we predicted it."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

Label = Literal["predicted", "input"]
Verdict = Literal["within", "outside", "not reproducible"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A published claim and our number for it. Raises ValueError where the verdict would hang in the air."""

    system: str
    claim: str
    """As published, with where: `1.4x the throughput of Baseline-H100 (abstract)`."""
    setting: str
    """What ours was measured in: machines, workload, length. Nothing measured is in it: with system and claim it names the row."""
    published: str
    """The value or values, as people read them."""
    ours: float | None
    """None where it cannot be reproduced."""
    unit: str
    """`x`, `rps`, `ms`, or empty for a pure number."""
    label: Label
    """`predicted`: follows from the mechanism and from measured step times. `input`: taken from a publication, and only checked."""
    depends_on_prefill: bool
    """Whether `ours` follows from prefill times: it must then move with `Settings.prefill_cost`."""
    low: float = -math.inf
    """The least that agrees with what was published. Which tolerance or bracket that is stands in `tolerance`."""
    high: float = math.inf
    tolerance: str
    """How `low` and `high` come about: `bracket of the reference sweep`, `15 %`."""
    why: str = ""
    """Why it cannot be reproduced, or what is known of a difference. Needed where `ours` is None or outside."""
    seconds: float = 0.0
    """What it took to compute, of the wall clock; set by the one who runs it."""
    quick: bool = False
    """Whether it was cut short, so that its value is rough; set by the one who runs it."""

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"{self.system}, {self.claim}: low {self.low} above high {self.high}")
        if self.ours is None and not self.why:
            raise ValueError(f"{self.system}, {self.claim}: not reproducible, and no reason given")

    @property
    def verdict(self) -> Verdict:
        if self.ours is None:
            return "not reproducible"
        return "within" if self.low <= self.ours <= self.high else "outside"

    @property
    def name(self) -> tuple[str, str, str]:
        """Unlike every other row's, and the same in every run."""
        return self.system, self.claim, self.setting
