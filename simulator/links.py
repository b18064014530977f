"""KV on its way between nodes: each node sends and receives so many bytes a second, shared evenly by what is on its way.

A flow gets the smaller of its even shares at its two ends (what max-min fairness gives where all flows at a node are bound there;
less than it where some are bound elsewhere). Nothing is lost or reordered.
"""

from __future__ import annotations

from collections.abc import Callable

from simulator.timeline import Timeline


class Flow:
    """One transfer."""

    __slots__ = ("_done", "_left_bytes", "_version", "rate", "since_s", "source", "target")

    def __init__(self, source: str, target: str, left_bytes: float, done: Callable[[], None], now_s: float) -> None:
        self.source, self.target = source, target
        self._left_bytes, self._done = left_bytes, done
        self.rate, self.since_s, self._version = 0.0, now_s, 0


class Links:
    """All nodes' links."""

    def __init__(self, timeline: Timeline, bytes_per_s: float) -> None:
        """bytes_per_s: of each node, each way, > 0."""
        self._timeline, self._bytes_per_s = timeline, bytes_per_s
        self._out: dict[str, dict[Flow, None]] = {}
        self._in: dict[str, dict[Flow, None]] = {}

    def share(self, source: str, target: str) -> float:
        """Bytes per second that one more flow would get."""
        busiest = max(len(self._out.get(source, ())), len(self._in.get(target, ())))
        return self._bytes_per_s / (busiest + 1)

    def send(self, source: str, target: str, size_bytes: float, done: Callable[[], None]) -> Flow:
        """Begin a transfer; `done` is called when the last byte has come."""
        flow = Flow(source, target, size_bytes, done, self._timeline.now_s)
        self._out.setdefault(source, {})[flow] = None
        self._in.setdefault(target, {})[flow] = None
        self._share_anew(source, target)
        return flow

    def cancel(self, flow: Flow) -> None:
        """Nobody wants it any more. Harmless after it is done."""
        if self._out.get(flow.source, {}).pop(flow, self) is self:
            return
        del self._in[flow.target][flow]
        flow._version += 1
        self._share_anew(flow.source, flow.target)

    def _share_anew(self, source: str, target: str) -> None:
        for flow in {**self._out[source], **self._in[target]}:
            self._progress(flow)
            busiest = max(len(self._out[flow.source]), len(self._in[flow.target]))
            flow.rate = self._bytes_per_s / busiest
            flow._version += 1
            ends_s = self._timeline.now_s + flow._left_bytes / flow.rate
            self._timeline.at(ends_s, lambda flow=flow, version=flow._version: self._arrived(flow, version))

    def _progress(self, flow: Flow) -> None:
        now_s = self._timeline.now_s
        flow._left_bytes = max(0.0, flow._left_bytes - flow.rate * (now_s - flow.since_s))
        flow.since_s = now_s

    def _arrived(self, flow: Flow, version: int) -> None:
        if version == flow._version:
            self.cancel(flow)
            flow._done()
