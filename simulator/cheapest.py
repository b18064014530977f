"""The cheapest fleet that serves a traffic under its SLO, found by simulating few of many.

What need not be simulated:
1. fleets that formulas exclude (`simulator.foresight`);
2. fleets with no more of any group than one that failed: they fail as well;
3. fleets no cheaper than one that serves.
What is simulated is first tried on the busiest slice of the traffic: a fleet that misses more there than the whole traffic may miss
is refused. A whole run ends as soon as it has missed that many.

The search first halves the interval of prices, each price being stood for by the fleet that is expected to carry most for it. Then
it tries what is left among the cheaper fleets, the largest first, until none is left: so the answer is the cheapest of the space.

Assumed is that a replica more does no harm (2.), and that a slice does not miss more by itself than within the whole. Both are
nearly but not exactly so: another replica changes who is sent where. So the answer's neighbours, one replica less and one more of
each group, are simulated whole, whatever was assumed of them, and a cheaper one that serves takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec
import numpy as np

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet
from simulator.case import Case
from simulator.foresight import TRUST, Foresight, performance_of
from simulator.machines import machines_of
from simulator.outcome import Outcome
from simulator.space import Space
from simulator.survey import Slice, survey

NOISE_SIGMAS = 2.0
Kind = Literal["slice", "whole"]
Ask = Callable[[Case, str], Outcome]
"""Has a case simulated, or remembers what came of it. The text says which, for a person who waits."""


def _harmed(before: Outcome, after: Outcome) -> bool:
    """Whether less is kept by more than chance explains: two standard deviations of a difference of two shares (binomial)."""
    variance = sum(one.attainment * (1.0 - one.attainment) / one.arrived for one in (before, after))
    return before.attainment - after.attainment > NOISE_SIGMAS * math.sqrt(variance)


def in_words(replicas: Mapping[str, int]) -> str:
    """Role and pool are enough: there is one model."""
    return ", ".join(f"{count} x {group.partition('/')[2]}" for group, count in replicas.items() if count)


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One fleet that was simulated."""

    replicas: dict[str, int]
    usd_per_hour: float
    serves: bool
    kind: Kind
    """What it was judged by."""
    outcome: Outcome

    @property
    def words(self) -> str:
        return in_words(self.replicas)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What was found, and how."""

    goal: float
    best: Trial
    nodes: int
    fleets: int
    """In the space."""
    excluded: int
    """By formulas."""
    dominated: int
    """Not above one that failed."""
    dearer: int
    """No cheaper than one that serves."""
    sliced: int
    """Simulated on the busiest slice."""
    refused: int
    """Of those, refused by it."""
    whole: int
    """Simulated on the whole traffic, neighbours included."""
    stopped: int
    """Of those, ended early."""
    neighbours: list[Trial]
    """One replica less or more of a group."""
    cheaper: list[Trial]
    """The best that failed among the cheaper ones, best first."""
    surprises: list[str]
    """Where what is assumed did not hold."""


class Search:
    """Of one space, for one traffic. `answer` carries it out."""

    def __init__(self, case: Case, space: Space, goal: float, ask: Ask) -> None:
        """case: its traffic, world, seed and warm-up; fleets are those of the space. goal: attainment, in (0, 1)."""
        self._case = msgspec.structs.replace(case, control=False, may_miss=None)
        self._space, self._goal, self._ask = space, goal, ask
        machines = machines_of(space.fleet, case.world)
        seen = survey(case.traffic.open(case.seed), case.warm_up_s, performance_of(machines[space.groups[0]]))
        if not seen.requests:
            raise InvalidConfig(f"warm-up {case.warm_up_s:g} s: no request arrives after it, in {seen.span_s:.0f} s of traffic")
        self._may_miss = math.floor((1.0 - goal) * seen.requests + 1e-9)
        self._slice = None if seen.slice is None else self._slice_case(seen.slice, seen.shared)
        foresight = Foresight(space, machines, seen, space.fleet.slo)
        self._expected = foresight.expected
        self._excluded = foresight.most < TRUST * goal
        self._alive = ~self._excluded
        self._dominated = np.zeros(len(self._alive), bool)
        self._trials: dict[int, Trial] = {}
        self._best: int | None = None
        self._sliced = self._refused = self._whole = self._stopped = 0
        self._surprises: list[str] = []

    def answer(self) -> Answer:
        """Raises InvalidConfig where no fleet of the space serves, saying how near the best came and what it is bound by."""
        self._bracket()
        self._exhaust()
        if self._best is None:
            self._best = self._last_chance()
        neighbours = self._check_neighbours()
        assert self._best is not None
        best = self._trials[self._best]
        failed = [one for one in self._trials.values() if not one.serves and one.usd_per_hour < best.usd_per_hour]
        dearer = ~self._excluded & ~self._dominated & (self._space.usd_per_hour >= best.usd_per_hour)
        return Answer(
            goal=self._goal,
            best=best,
            nodes=len(self._space.build(self._best).nodes),
            fleets=len(self._alive),
            excluded=int(self._excluded.sum()),
            dominated=int((self._dominated & ~self._excluded).sum()),
            dearer=int(dearer.sum()) - sum(bool(dearer[number]) for number in self._trials),
            sliced=self._sliced,
            refused=self._refused,
            whole=self._whole,
            stopped=self._stopped,
            neighbours=neighbours,
            cheaper=sorted(failed, key=lambda one: (one.kind == "slice", -one.outcome.attainment)),
            surprises=self._surprises,
        )

    def fleet(self) -> Fleet:
        """The answer's."""
        assert self._best is not None, "there is no answer yet"
        return self._space.build(self._best)

    # ── which are tried ──

    def _bracket(self) -> None:
        """The lowest price whose most promising fleet serves. From the first price that is expected to do, by doubling steps."""
        champions = self._champions()
        if not champions:
            return
        fails, serves, step = -1, len(champions), 1
        level = next((at for at, number in enumerate(champions) if self._expected[number] >= 1.0), len(champions) - 1)
        while serves - fails > 1:
            if self._serves(champions[level]):
                serves = level
            else:
                fails = level
            if fails == -1:
                level = max(serves - step, 0)
            elif serves == len(champions):
                level = min(fails + step, len(champions) - 1)
            else:
                level = (fails + serves) // 2
            step *= 2

    def _champions(self) -> list[int]:
        """For each price that brings something, the fleet of at most that price of which most is expected."""
        alive = np.flatnonzero(self._alive)
        order = alive[np.lexsort((-self._expected[alive], self._space.usd_per_hour[alive]))]
        champions: list[int] = []
        for number in order.tolist():
            if not champions or self._expected[number] > self._expected[champions[-1]]:
                champions.append(number)
        return champions

    def _exhaust(self) -> None:
        """Until every fleet that is cheaper than the best is known or assumed to fail."""
        sizes = self._space.counts.sum(axis=1)
        while self._alive.any():
            left = np.flatnonzero(self._alive)
            self._serves(int(left[np.lexsort((sizes[left], self._expected[left]))[-1]]))

    def _serves(self, number: int) -> bool:
        """Whether a fleet does, and what follows for others."""
        trial = self._trials.get(number) or self._try(number)
        self._alive[number] = False
        if trial.serves:
            if self._best is None or trial.usd_per_hour < self._trials[self._best].usd_per_hour:
                self._best = number
            self._alive &= self._space.usd_per_hour < trial.usd_per_hour
        else:
            below = (self._space.counts <= self._space.counts[number]).all(axis=1)
            below[number] = False
            self._dominated |= below & self._alive
            self._alive &= ~below
        return trial.serves

    # ── how they are tried ──

    def _slice_case(self, part: Slice, shared: bool) -> Case:
        """The pilots' but for its fleet. Where prompts share prefixes, as long a stretch before it fills the caches."""
        lead_s = min(part.start_s, part.span_s) if shared else 0.0
        traffic = self._case.traffic.part(part.start_s - lead_s, part.span_s + lead_s)
        return msgspec.structs.replace(self._case, traffic=traffic, warm_up_s=lead_s, may_miss=self._may_miss)

    def _try(self, number: int) -> Trial:
        """On the slice, if there is one, and then on the whole."""
        if self._slice is not None:
            outcome = self._simulate(number, self._slice, "slice")
            if outcome.outside > self._may_miss:
                self._refused += 1
                return self._keep(number, "slice", outcome, serves=False)
        return self._try_whole(number, self._may_miss)

    def _try_whole(self, number: int, may_miss: int | None) -> Trial:
        """may_miss: None to know how much it misses in all."""
        case = msgspec.structs.replace(self._case, may_miss=may_miss)
        outcome = self._simulate(number, case, "whole")
        return self._keep(number, "whole", outcome, serves=not outcome.stopped and outcome.attainment >= self._goal)

    def _simulate(self, number: int, like: Case, kind: Kind) -> Outcome:
        case = msgspec.structs.replace(like, fleet=self._space.build(number))
        outcome = self._ask(case, f"{in_words(self._space.named(self._space.counts[number]))}, {kind}")
        self._sliced += kind == "slice"
        self._whole += kind == "whole"
        self._stopped += kind == "whole" and outcome.stopped
        return outcome

    def _keep(self, number: int, kind: Kind, outcome: Outcome, *, serves: bool) -> Trial:
        trial = self._trials[number] = Trial(
            replicas=self._space.named(self._space.counts[number]),
            usd_per_hour=float(self._space.usd_per_hour[number]),
            serves=serves,
            kind=kind,
            outcome=outcome,
        )
        return trial

    # ── what is assumed, looked at ──

    def _check_neighbours(self) -> list[Trial]:
        """One less and one more of each group, to the end. A cheaper one that serves becomes the best, and is checked itself."""
        while True:
            assert self._best is not None
            best, found = self._trials[self._best], []
            for sign in (-1, 1):
                for number in self._beside(self._best, sign):
                    trial = self._trials.get(number)
                    if trial is None or trial.kind == "slice" or trial.outcome.stopped:
                        trial = self._try_whole(number, None)
                    found.append(trial)
                    if sign == 1 and _harmed(best.outcome, trial.outcome):
                        share = f"{trial.outcome.attainment:.2%}, not {best.outcome.attainment:.2%}"
                        self._surprises.append(f"{trial.words} keeps the SLO for {share}, though it has a replica more")
            cheaper = [one for one in found if one.serves and one.usd_per_hour < best.usd_per_hour]
            if not cheaper:
                return found
            better = min(cheaper, key=lambda one: one.usd_per_hour)
            self._surprises.append(f"{better.words} serves, though it was taken for one that fails")
            self._best = next(number for number, one in self._trials.items() if one is better)

    def _beside(self, number: int, sign: int) -> list[int]:
        counts = self._space.counts[number]
        steps = np.eye(len(counts), dtype=counts.dtype) * sign
        found = [self._space.find(counts + step) for step in steps]
        return [one for one in found if one is not None]

    def _last_chance(self) -> int:
        """The fleet that came nearest, run to its end, if that serves after all. Raises InvalidConfig saying how near it came."""
        number = max(self._trials, key=self._nearness, default=int(np.argmax(self._expected)))
        best = self._try_whole(number, None)
        if best.serves:
            self._surprises.append(f"{best.words} serves, though formulas exclude it")
            return number
        missed = ", ".join(f"{name} by {count / best.outcome.arrived:.1%}" for name, count in best.outcome.missed.items() if count)
        raise InvalidConfig(
            f"none of the {len(self._alive)} fleets in the space keeps the SLO for {self._goal:.4g} of the requests: the best, "
            f"{best.words} at {best.usd_per_hour:.2f} USD/h, keeps it for {best.outcome.attainment:.4g}, and is bound by "
            f"{best.outcome.binding} (missed: {missed}); give groups more replicas and nodes, in a space file"
        )

    def _nearness(self, number: int) -> tuple[bool, float, float]:
        trial = self._trials[number]
        return (trial.kind == "whole", trial.outcome.attainment, float(self._expected[number]))
