"""Which nodes may be counted on: those that Ray lists, less those of which workers fell silent until they answer again.

A node that comes and goes is trusted later each time, so that a loose cable does not move the fleet to and fro.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

DAMP_S = 10.0  # Trusted so long after its first return, twice as long after each further loss.
MAX_DAMP_S = 300.0
FORGET_S = 600.0  # Losses older than this say nothing about now.


class _Machine(msgspec.Struct):
    told: bool = False
    """Ray lists it."""
    suspect: bool = False
    lost_s: tuple[float, ...] = ()
    """When it was lost, of late."""
    back_s: float | None = None
    """When it came back from being lost; None while it never was, or is."""


class Machines:
    """Nodes by name."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """clock: seconds that never step back."""
        self._machines: dict[str, _Machine] = {}
        self._clock = clock

    def told(self, alive: frozenset[str]) -> None:
        """Ray's list. It lags: a node that died stays in it for some 15 s."""
        for name in alive:
            self._machines.setdefault(name, _Machine())
        for name, machine in self._machines.items():
            if machine.told and name not in alive:
                self._lose(machine)
            elif not machine.told and name in alive and machine.lost_s:
                machine.back_s = self._clock()
            machine.told = name in alive

    def told_alive(self, name: str) -> bool:
        return name in self._machines and self._machines[name].told

    def suspect(self, name: str) -> None:
        """A worker there fell silent: nothing new goes there until the node answers."""
        self._machines.setdefault(name, _Machine()).suspect = True

    def answered(self, name: str) -> None:
        """It did what it was asked."""
        machine = self._machines[name]
        machine.suspect = False
        if machine.lost_s and machine.back_s is None:
            machine.back_s = self._clock()

    def unanswered(self, name: str) -> None:
        """It did not, in time."""
        machine = self._machines[name]
        if machine.suspect and (machine.back_s is not None or not machine.lost_s):
            self._lose(machine)

    @property
    def suspects(self) -> frozenset[str]:
        return frozenset(name for name, machine in self._machines.items() if machine.suspect)

    def alive(self) -> frozenset[str]:
        """Those that may be counted on."""
        return frozenset(name for name, machine in self._machines.items() if machine.told and self._trusted(machine))

    def _trusted(self, machine: _Machine) -> bool:
        machine.lost_s = tuple(at_s for at_s in machine.lost_s if self._clock() - at_s < FORGET_S)
        if machine.suspect:
            return False
        if not machine.lost_s:
            machine.back_s = None
            return True
        wait_s = min(DAMP_S * 2.0 ** (len(machine.lost_s) - 1), MAX_DAMP_S)
        return machine.back_s is not None and self._clock() - machine.back_s >= wait_s

    def _lose(self, machine: _Machine) -> None:
        machine.lost_s = (*machine.lost_s, self._clock())
        machine.back_s = None
