"""A trace is read once before it is simulated: what no replica could serve, or the fleet does not know, is refused with its line.

Only files are: a generator makes what it was told to. The reading holds no row longer than the stream does.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from cluster.errors import InvalidTrace
from cluster.fleet import Fleet
from cluster.placement import group_of, limits_of
from cluster.record import TraceRow
from controller.config import model_of
from workloads.stream import Workload

DEFAULT_CLASS = "default"  # A gateway takes it, whatever classes the fleet names.
TOLD_EVERY_ROWS = 2000


class Looked(msgspec.Struct, frozen=True, kw_only=True):
    """What a trace comes to."""

    rows: int
    longest_prompt_tokens: int
    span_s: float
    """Between the first arrival and the last."""


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """The most that a replica holds of one request."""

    tokens: int
    group: str

    @property
    def words(self) -> str:
        return f"{self.tokens}, the most that a replica holds ({self.group})"


def room_of(fleet: Fleet, model: str) -> Room:
    """Of a model: its roomiest group that decodes, as the router counts."""
    served = [spec for spec in fleet.replicas if model_of(fleet, spec).name == model]
    decoding = [spec for spec in served if spec.role.decodes and limits_of(spec)[1] > 0]
    roomiest = max(decoding, key=lambda spec: spec.kv_blocks * spec.block_tokens)
    return Room(tokens=roomiest.kv_blocks * roomiest.block_tokens, group=group_of(fleet, roomiest))


def look_through(
    workload: Workload, fleet: Fleet, model: str, told: Callable[[int, float], None] = lambda rows, share: None
) -> Looked:
    """Read it all. model: that it asks for. told: now and then of the rows read, and the share of the whole that they are.

    Raises InvalidTrace at the first line that is broken, out of order, too long for every replica, or of an unknown SLO class.
    """
    room, classes = room_of(fleet, model), {DEFAULT_CLASS, *fleet.slo}
    rows = longest = 0
    first_s = last_s = 0.0
    for row in workload:
        _check(row, room, classes, workload)
        first_s, last_s = (first_s if rows else row.arrival_s), row.arrival_s
        rows, longest = rows + 1, max(longest, row.prompt_tokens)
        if rows % TOLD_EVERY_ROWS == 0:
            told(rows, workload.progress)
    return Looked(rows=rows, longest_prompt_tokens=longest, span_s=last_s - first_s)


def _check(row: TraceRow, room: Room, classes: set[str], workload: Workload) -> None:
    prompt, output = row.prompt_tokens, max(1, row.output_tokens)
    if prompt + output > room.tokens:
        raise InvalidTrace(
            f"{workload.place}: {prompt} prompt and {output} output tokens are {prompt + output}, above {room.words}; "
            "raise kv_blocks, or cut prompts and outputs"
        )
    if row.slo_class not in classes:
        raise InvalidTrace(
            f"{workload.place}: slo_class {row.slo_class!r} is none of this fleet's, under `slo`: {', '.join(sorted(classes))}"
        )
