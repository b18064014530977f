"""A step table at a lower clock: what was published of it, and nothing beyond.

Prompts are bound by compute and last 1 / share as long; decode steps are bound by memory, whose clock stays, and last the same.
That is Splitwise's capped H100 (ISCA'24; its simulator's `h100-80gb-pcap`): at 70 % of the power prompts last 1.3 times as
long and tokens 1.0 times, so that 70 % of the power is a share of 1 / 1.3 of the clock. Watts above idle go with the share to
the power that makes this so, 1.54 where a device idles at a tenth of its TDP, for prompts and decodes alike; of decodes it is
an assumption. It agrees with POLCA (ASPLOS'24): A100 at 1110 of 1410 MHz saves 25 % of peak power here, 20 % there.
"""

from __future__ import annotations

import math

import msgspec

from cluster.errors import InvalidConfig
from cluster.piecewise import Knots
from cluster.step_table import StepTable

CAPPED_PROMPT = 1.3  # Times as long a prompt lasts ...
CAPPED_POWER = 0.7  # ... at this share of the power, on H100, whose idle share of TDP is this:
IDLE_SHARE = 0.1
LEAST_SHARE = 1 / CAPPED_PROMPT  # Below, nothing was published but the brake's 288 MHz, without its times.
POWER_EXPONENT = math.log((CAPPED_POWER - IDLE_SHARE) / (1 - IDLE_SHARE)) / math.log(LEAST_SHARE)


def at_clock(table: StepTable, share: float) -> StepTable:
    """The same replica at that share of its maximum clock. Raises InvalidConfig outside [1 / 1.3, 1]."""
    if not LEAST_SHARE <= share <= 1.0:
        raise InvalidConfig(f"clock share {share:g} is outside [{LEAST_SHARE:.3f}, 1], where times were published")
    if share == 1.0:
        return table
    # `step_s` is part of a prompt, too, and slows down with it, but not with decodes.
    added_s = table.step_s * (1 / share - 1)
    power = share**POWER_EXPONENT
    told = f"clock at {share:.3g} of its maximum by Splitwise's cap on H100: prompts x {1 / share:.3g}, decode x 1, watts by power"
    return msgspec.structs.replace(
        table,
        prefill=_longer(table.prefill, 1 / share, added_s),
        prefill_pair_s=table.prefill_pair_s / share,
        prefill_w=_dimmed(table, table.prefill_w, power),
        decode_w=tuple((batch, _dimmed(table, watts, power)) for batch, watts in table.decode_w),
        fit=msgspec.structs.replace(table.fit, derived=f"{told}; {table.fit.derived}" if table.fit.derived else told),
    )


def _longer(knots: Knots, factor: float, added_s: float) -> Knots:
    """All but the first knot so much later; a line alone gets a knot more, so that it goes on with its own slope."""
    if len(knots) == 2:
        (_, _), (place, value) = knots
        knots = (*knots, (2 * place, 2 * value))
    return (knots[0], *((place, factor * value + added_s) for place, value in knots[1:]))


def _dimmed(table: StepTable, watts: float, power: float) -> float:
    return table.idle_w + power * (watts - table.idle_w) if watts > table.idle_w else watts
