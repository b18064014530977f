"""KV on its way between nodes: each node sends and receives so many bytes a second, shared evenly by what is on its way.

A flow gets the smaller of its even shares at its two ends (what max-min fairness gives where all flows at a node are bound there;
less than it where some are bound elsewhere). Within a node flows share the machine's own link. Nothing is lost or reordered.
"""

from __future__ import annotations

from collections.abc import Callable

from simulator.timeline import Timeline


class Flow:
    """One transfer."""

    __slots__ = ("done", "ends", "left_bytes", "rate", "since_s")

    def __init__(self, ends: tuple[str, str], left_bytes: float, done: Callable[[], None], now_s: float) -> None:
        self.ends, self.left_bytes, self.done = ends, left_bytes, done
        self.rate, self.since_s = 0.0, now_s

    @property
    def ends_s(self) -> float:
        """When its last byte comes, at its present rate."""
        return self.since_s + self.left_bytes / self.rate


class Links:
    """All nodes' links."""

    def __init__(self, timeline: Timeline, bytes_per_s: float) -> None:
        """bytes_per_s: of each node, each way, > 0."""
        self._timeline, self._bytes_per_s = timeline, bytes_per_s
        self._inside: dict[str, float] = {}
        self._at: dict[str, dict[Flow, None]] = {}
        """By end: `>node` sends, `node>` receives, `node` keeps to itself."""
        self._flows: dict[Flow, None] = {}
        self._version = 0

    def inside(self, node: str, bytes_per_s: float) -> None:
        """What a node moves within itself, > 0; as much as its links unless said."""
        self._inside[node] = bytes_per_s

    def share(self, source: str, target: str) -> float:
        """Bytes per second that one more flow would get."""
        ends = _ends(source, target)
        return self._whole(ends) / (max(len(self._at.get(end, ())) for end in ends) + 1)

    def send(self, source: str, target: str, size_bytes: float, done: Callable[[], None]) -> Flow:
        """Begin a transfer; `done` is called when the last byte has come."""
        flow = Flow(_ends(source, target), size_bytes, done, self._timeline.now_s)
        self._flows[flow] = None
        for end in flow.ends:
            self._at.setdefault(end, {})[flow] = None
        self._share_anew(flow.ends)
        return flow

    def cancel(self, flow: Flow) -> None:
        """Nobody wants it any more. Harmless after it is done."""
        if flow in self._flows:
            self._remove(flow)
            self._share_anew(flow.ends)

    def _remove(self, flow: Flow) -> None:
        del self._flows[flow]
        for end in flow.ends:
            self._at[end].pop(flow, None)

    def _whole(self, ends: tuple[str, str]) -> float:
        return self._inside.get(ends[0], self._bytes_per_s) if ends[0] == ends[1] else self._bytes_per_s

    def _share_anew(self, ends: tuple[str, str]) -> None:
        now_s = self._timeline.now_s
        for flow in {**self._at[ends[0]], **self._at[ends[1]]}:
            flow.left_bytes = max(0.0, flow.left_bytes - flow.rate * (now_s - flow.since_s))
            flow.since_s = now_s
            flow.rate = self._whole(flow.ends) / max(len(self._at[end]) for end in flow.ends)
        self._await_next()

    def _await_next(self) -> None:
        """One event for all: the first to end."""
        self._version += 1
        version = self._version
        if self._flows:
            at_s = min(flow.ends_s for flow in self._flows)
            self._timeline.at(max(at_s, self._timeline.now_s), lambda: self._arrived(version))

    def _arrived(self, version: int) -> None:
        if version != self._version:
            return
        flow = min(self._flows, key=lambda one: one.ends_s)
        self._remove(flow)
        self._share_anew(flow.ends)
        flow.done()


def _ends(source: str, target: str) -> tuple[str, str]:
    return (source, source) if source == target else (f">{source}", f"{target}>")
