"""Who waits for replicas of one model. Those who resume go before all newcomers; what was accepted bounds their number."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from policies.admission import AdmissionQueue


class Waiter(Protocol):
    """A request on its way through a gateway."""

    queued_s: float
    """When it lost its replica, or arrived."""


Waits = TypeVar("Waits", bound=Waiter)


class Line(Generic[Waits]):
    """By request id. `queue` takes newcomers in; who waits there is in `newcomers`, too."""

    def __init__(self, *, max_waiting: int, timeout_s: float) -> None:
        """Bounds of newcomers: how many, and seconds that any waits."""
        self.queue = AdmissionQueue(max_waiting=max_waiting, timeout_s=timeout_s)
        self.newcomers: dict[str, Waits] = {}
        self.resuming: dict[str, Waits] = {}
        self._timeout_s = timeout_s

    def __len__(self) -> int:
        return len(self.newcomers) + len(self.resuming)

    def first(self, now_s: float) -> Waits | None:
        if self.resuming:
            return next(iter(self.resuming.values()))
        entry = self.queue.peek(now_s)
        return None if entry is None else self.newcomers[entry.request_id]

    def leave(self, request_id: str, now_s: float) -> None:
        """It gave up. Harmless when it does not wait."""
        self.queue.cancel(request_id, now_s)
        self.newcomers.pop(request_id, None)
        self.resuming.pop(request_id, None)

    def advance(self, request_id: str, now_s: float) -> None:
        """The first one goes on."""
        if self.resuming.pop(request_id, None) is None:
            self.queue.pop(now_s)
            del self.newcomers[request_id]

    def overdue(self, now_s: float) -> list[Waits]:
        """Newcomers are taken out; those who resume stay until they leave."""
        expired = [self.newcomers.pop(entry.request_id) for entry in self.queue.expire(now_s)]
        return expired + [one for one in self.resuming.values() if one.queued_s + self._timeout_s <= now_s]
