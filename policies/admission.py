"""Who may go on now, who waits, who is sent away: a gateway's bounded queue with deadlines."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import msgspec

RATE_POPS = 64  # Pops over which the drain rate is measured: enough for a steady figure, recent enough to follow load.


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A request that wants to go on."""

    request_id: str
    tenant: str = "default"
    priority: int = 0
    """Higher goes first."""
    deadline_s: float | None = None
    """After this nobody wants it; None leaves the queue's own timeout."""


class Admitted(msgspec.Struct, frozen=True):
    """Go on at once: there is room and nobody waits before it."""


class Queued(msgspec.Struct, frozen=True, kw_only=True):
    """It waits: `pop` or `expire` will give it back."""

    deadline_s: float
    displaced: str | None = None
    """The request that gave up its place for it and is out: the newest of the tenant that holds most."""


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    reason: str
    retry_after_s: float
    """When all that waits now is expected to have gone on."""


class AdmissionQueue:
    """The state machine. Every entry offered comes out once: admitted, refused, popped, expired or cancelled.

    Higher priorities first; within one, tenants take turns, and a tenant's own requests go in order of arrival. Nor does a tenant
    keep others out: of a full queue a priority's places are shared evenly between the tenants that ask for them. Times are seconds
    of one clock, which never goes back.
    """

    def __init__(self, *, max_waiting: int = 256, timeout_s: float = 30.0) -> None:
        """max_waiting: entries that may wait, >= 0. timeout_s: an entry waits no longer, > 0."""
        self._max_waiting = max_waiting
        self._timeout_s = timeout_s
        self._waiting: dict[str, tuple[Entry, float]] = {}
        self._lines: dict[int, dict[str, dict[str, None]]] = {}
        self._earliest_s = math.inf
        self._expired: list[Entry] = []
        self._pops_s: deque[float] = deque(maxlen=RATE_POPS)
        self._busy_s = 0.0
        self._busy_since_s: float | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, entry: Entry, now_s: float, *, room_s: float | None) -> Admitted | Queued | Refused:
        """A request id may wait once at a time.

        room_s: when a replica is predicted to have room for it, seconds; None where one has room now.
        """
        self._sweep(now_s)
        assert entry.request_id not in self._waiting, f"request {entry.request_id} already waits"
        if room_s is None and not any(priority >= entry.priority for priority in self._lines):
            return Admitted()
        if entry.deadline_s is not None and entry.deadline_s <= now_s:
            late_s = now_s - entry.deadline_s
            return Refused(reason=f"deadline passed {late_s:.3g} s ago", retry_after_s=self.retry_after_s(now_s, room_s))
        held = len(self._waiting) + len(self._expired)
        displaced = self._displaced_by(entry) if held >= self._max_waiting else None
        if held >= self._max_waiting and displaced is None:
            reason = f"{held} requests wait, as many as max_queue {self._max_waiting} allows"
            return Refused(reason=reason, retry_after_s=self.retry_after_s(now_s, room_s))
        if displaced is not None:
            self._remove(displaced, now_s)
        if self._busy_since_s is None:
            self._busy_since_s = now_s
        deadline_s = min(now_s + self._timeout_s, math.inf if entry.deadline_s is None else entry.deadline_s)
        self._waiting[entry.request_id] = (entry, deadline_s)
        self._lines.setdefault(entry.priority, {}).setdefault(entry.tenant, {})[entry.request_id] = None
        self._earliest_s = min(self._earliest_s, deadline_s)
        return Queued(deadline_s=deadline_s, displaced=None if displaced is None else displaced.request_id)

    def peek(self, now_s: float) -> Entry | None:
        """Who `pop` would give; None when nobody waits."""
        self._sweep(now_s)
        if not self._lines:
            return None
        tenants = self._lines[max(self._lines)]
        return self._waiting[next(iter(next(iter(tenants.values()))))][0]

    def pop(self, now_s: float) -> Entry | None:
        """Take the next one out; its tenant goes to the end of its priority's turn."""
        entry = self.peek(now_s)
        if entry is None:
            return None
        self._pops_s.append(self._clock_s(now_s))
        self._remove(entry, now_s)
        tenants = self._lines.get(entry.priority, {})
        if entry.tenant in tenants:
            tenants[entry.tenant] = tenants.pop(entry.tenant)
        return entry

    def expire(self, now_s: float) -> list[Entry]:
        """Take out who has passed their deadline, in order of arrival."""
        self._sweep(now_s)
        expired, self._expired = self._expired, []
        return expired

    def cancel(self, request_id: str, now_s: float) -> bool:
        """Its client went away. False where it does not wait."""
        if request_id not in self._waiting:
            return False
        self._remove(self._waiting[request_id][0], now_s)
        return True

    def retry_after_s(self, now_s: float, room_s: float | None = None) -> float:
        """Seconds until all that waits has gone on at the rate of the latest pops; before the first pop, at one every `room_s`.

        By the timeout all that waits now has gone on or given up, so never above that and one turn more. A time in which nobody
        waited says nothing of the rate.
        """
        span_s = self._clock_s(now_s) - self._pops_s[0] if self._pops_s else 0.0
        each_s = span_s / len(self._pops_s) if span_s > 0 else room_s
        return self._timeout_s if each_s is None else min(self._timeout_s, len(self._waiting) * each_s) + each_s

    def _clock_s(self, now_s: float) -> float:
        """Seconds in which somebody waited."""
        return self._busy_s + (0.0 if self._busy_since_s is None else now_s - self._busy_since_s)

    def _displaced_by(self, entry: Entry) -> Entry | None:
        """Whose place it may take: the newest of the tenant with most, where that one has more even then."""
        tenants = self._lines.get(entry.priority, {})
        most = max(tenants.values(), key=len, default={})
        if len(most) < len(tenants.get(entry.tenant, ())) + 2:
            return None
        return self._waiting[next(reversed(most))][0]

    def _sweep(self, now_s: float) -> None:
        if now_s < self._earliest_s:
            return
        late = [entry for entry, deadline_s in self._waiting.values() if deadline_s <= now_s]
        for entry in late:
            self._remove(entry, now_s)
        self._expired += late
        self._earliest_s = min(self._deadlines(), default=math.inf)

    def _deadlines(self) -> Iterator[float]:
        return (deadline_s for _, deadline_s in self._waiting.values())

    def _remove(self, entry: Entry, now_s: float) -> None:
        del self._waiting[entry.request_id]
        if not self._waiting:
            self._busy_s, self._busy_since_s = self._clock_s(now_s), None
        tenants = self._lines[entry.priority]
        del tenants[entry.tenant][entry.request_id]
        if not tenants[entry.tenant]:
            del tenants[entry.tenant]
        if not tenants:
            del self._lines[entry.priority]
