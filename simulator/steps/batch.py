"""One engine's steps: what the next one computes, how many alike may follow it, and what they leave behind.

Batching is that of `workers.engines.emulated`, request by request and block by block. What differs is that decode steps of an
unchanged batch are one *span*: its end is computed in closed form, and it ends early where somebody comes, goes or runs out of
blocks. With `LONGEST_SPAN` 1 every step is taken by itself.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from simulator.steps.blocks import available, hold, matched, release, share, take, unheld
from simulator.steps.calendar import schedule, unschedule
from simulator.steps.queues import enter, goes_before, leave, left
from simulator.steps.records import (
    CHUNKED,
    DECODING,
    ELSEWHERE,
    FINISHED,
    FIRST_TOKEN,
    JOINING,
    LONGEST_SPAN,
    NEVER,
    NOBODY,
    NOW,
    PREFILL_ONLY,
    PREFILLED,
    PREFILLING,
    PROMPTS_FIRST,
    RESERVED,
    SAID_COUNT,
    WAITING,
    WHOLE_PROMPTS,
    Fleet,
)
from simulator.steps.results import count_end, count_gap, count_steps
from simulator.steps.times import span_s, step_j, step_s, steps_to

SMOOTHING = 1 / 16
"""Weight of the newest step in the mean step time, as engines keep it."""


@njit(cache=True)
def next_step(fleet: Fleet, engine: int) -> None:
    """What was under way is over, at `clock[NOW]`: take it into the books, and begin the next."""
    e = fleet.engines[engine]
    if e.span_steps > 0:
        _complete(fleet, engine)
    _plan(fleet, engine)
    if e.span_steps > 0 or math.isfinite(e.ends_s):
        schedule(fleet, engine)
    else:
        unschedule(fleet, engine)


# ── what the next step computes ──


@njit(cache=True)
def _plan(fleet: Fleet, engine: int) -> None:
    e, now_s = fleet.engines[engine], fleet.clock[NOW]
    while e.first_joining != NOBODY:
        request = e.first_joining
        leave(fleet, engine, request)
        join(fleet, engine, request)
    _find_blocks(fleet, engine)
    _choose_prompts(fleet, engine)
    e.began_s = now_s
    e.decodes = 0 if e.chunks > 0 and _prompts_alone(fleet, engine) else e.batch
    if e.chunks > 0:
        e.span_steps = 1
        lasting_s = step_s(fleet, e.times, e.chunk_tokens, e.chunk_pairs, e.decodes, e.context_tokens)
    elif e.decodes > 0:
        e.span_steps = _span(fleet, engine)
        lasting_s = span_s(fleet, e.times, e.batch, e.context_tokens, e.span_steps)
    else:
        e.span_steps = 0
        e.ends_s = next_arrival_s(fleet, engine)
        return
    e.ends_s = now_s + e.slowness * lasting_s


@njit(cache=True)
def _prompts_alone(fleet: Fleet, engine: int) -> bool:
    """Whether decodes wait while the prompts that were chosen are computed."""
    e = fleet.engines[engine]
    return e.batching == PROMPTS_FIRST or (e.batching == WHOLE_PROMPTS and e.chunk_tokens + e.batch > e.budget)


@njit(cache=True)
def next_arrival_s(fleet: Fleet, engine: int) -> float:
    """When the first of those comes that are on their way; infinite without one."""
    e, now_s = fleet.engines[engine], fleet.clock[NOW]
    found_s = np.inf
    if e.latest_s <= now_s:
        return found_s
    request = e.first_waiting
    while request != NOBODY:
        if fleet.requests[request].queued_s > now_s:
            found_s = min(found_s, fleet.requests[request].queued_s)
        request = fleet.requests[request].after
    return found_s


@njit(cache=True)
def join(fleet: Fleet, engine: int, request: int) -> None:
    """Into the batch."""
    e, r, slot = fleet.engines[engine], fleet.requests[request], fleet.engines[engine].batch
    tokens = r.prompt + r.generated
    r.state, r.slot = DECODING, slot
    fleet.batch_request[engine, slot] = request
    fleet.batch_ends[engine, slot] = e.steps + r.output - r.generated
    fleet.batch_context[engine, slot] = tokens - e.steps
    fleet.batch_room[engine, slot] = r.blocks * e.block_tokens - (tokens - e.steps)
    fleet.batch_share[engine, slot] = _next_share(fleet, engine, request, tokens - e.steps)
    e.batch += 1
    e.fresh += 1
    e.context_tokens += tokens


@njit(cache=True)
def _next_share(fleet: Fleet, engine: int, request: int, context: int) -> int:
    r = fleet.requests[request]
    return (r.shared + 1) * fleet.engines[engine].block_tokens + 1 - context if r.shared < r.hashes else NEVER


@njit(cache=True)
def leave_batch(fleet: Fleet, engine: int, request: int) -> None:
    """Out of the batch, its progress written down; those that are fresh stay at the end."""
    e, r = fleet.engines[engine], fleet.requests[request]
    slot, first_fresh = r.slot, e.batch - e.fresh
    generated = r.output - (fleet.batch_ends[engine, slot] - e.steps)
    e.context_tokens -= r.prompt + generated
    r.computed = r.prompt + generated - 1
    r.generated = generated
    r.slot, r.state = NOBODY, ELSEWHERE
    if slot < first_fresh:
        r.last_s = (fleet.clock[NOW] if e.span_steps == 0 else e.began_s) - e.stall_s
        _move(fleet, engine, first_fresh - 1, slot)
        slot = first_fresh - 1
    else:
        e.fresh -= 1
    _move(fleet, engine, e.batch - 1, slot)
    e.batch -= 1


@njit(cache=True)
def _move(fleet: Fleet, engine: int, source: int, target: int) -> None:
    if source == target:
        return
    request = fleet.batch_request[engine, source]
    fleet.requests[request].slot = target
    fleet.batch_request[engine, target] = request
    fleet.batch_ends[engine, target] = fleet.batch_ends[engine, source]
    fleet.batch_context[engine, target] = fleet.batch_context[engine, source]
    fleet.batch_room[engine, target] = fleet.batch_room[engine, source]
    fleet.batch_share[engine, target] = fleet.batch_share[engine, source]


@njit(cache=True)
def _find_blocks(fleet: Fleet, engine: int) -> None:
    """A block for each decode whose next token has none; the newest of the lowest priority goes back where they run out."""
    e, short = fleet.engines[engine], 0
    for slot in range(e.batch):
        short += fleet.batch_room[engine, slot] < e.steps
    if short > available(fleet, engine):
        _find_blocks_in_turn(fleet, engine)
        return
    for slot in range(e.batch if short else 0):
        if fleet.batch_room[engine, slot] < e.steps:
            take(fleet, engine, fleet.batch_request[engine, slot], 1)
            fleet.batch_room[engine, slot] += e.block_tokens


@njit(cache=True)
def _find_blocks_in_turn(fleet: Fleet, engine: int) -> None:
    e = fleet.engines[engine]
    while True:
        neediest = NOBODY
        for slot in range(e.batch):
            request = fleet.batch_request[engine, slot]
            needs = fleet.batch_room[engine, slot] < e.steps
            if needs and (neediest == NOBODY or goes_before(fleet, request, neediest)):
                neediest = request
        if neediest == NOBODY:
            return
        if available(fleet, engine) > 0:
            take(fleet, engine, neediest, 1)
            fleet.batch_room[engine, fleet.requests[neediest].slot] += e.block_tokens
        else:
            _preempt(fleet, engine, _last_in_rank(fleet, engine))


@njit(cache=True)
def _last_in_rank(fleet: Fleet, engine: int) -> int:
    """Of those that hold blocks, in the batch or computing a prompt."""
    e = fleet.engines[engine]
    last = e.last_prefilling
    for slot in range(e.batch):
        request = fleet.batch_request[engine, slot]
        if last == NOBODY or goes_before(fleet, last, request):
            last = request
    return last


@njit(cache=True)
def _preempt(fleet: Fleet, engine: int, request: int) -> None:
    """Back to the queue, to be computed again."""
    r = fleet.requests[request]
    if r.state == DECODING:
        leave_batch(fleet, engine, request)
    else:
        leave(fleet, engine, request)
    release(fleet, engine, request)
    r.computed, r.preempted = 0, 1
    r.preemptions += 1
    fleet.engines[engine].preemptions += 1
    enter(fleet, engine, request, WAITING)


@njit(cache=True)
def _choose_prompts(fleet: Fleet, engine: int) -> None:
    e, now_s = fleet.engines[engine], fleet.clock[NOW]
    e.chunks, e.chunk_tokens, e.chunk_pairs = 0, 0, 0
    budget = e.budget if e.batching == PROMPTS_FIRST else e.budget - e.batch
    request = e.first_prefilling
    while request != NOBODY:
        budget = _choose(fleet, engine, request, budget)
        request = fleet.requests[request].after
    request = e.first_waiting
    while request != NOBODY and budget > 0 and has_room(fleet, engine):
        following, r = fleet.requests[request].after, fleet.requests[request]
        if r.queued_s > now_s:  # Not here yet.
            request = following
            continue
        whole = e.batching != CHUNKED and e.chunks > 0 and left(fleet, request) > budget
        if whole or not place(fleet, engine, request, r.prompt + r.generated - 1):
            return
        leave(fleet, engine, request)
        r.computed = r.shared * e.block_tokens
        enter(fleet, engine, request, PREFILLING)
        if r.cached < 0:
            r.cached, r.started_s = r.computed, now_s
            e.cached_tokens += r.computed
        budget = _choose(fleet, engine, request, budget)
        request = following


@njit(cache=True)
def _choose(fleet: Fleet, engine: int, request: int, budget: int) -> int:
    """Give a prompt what it needs of the budget; returns what is left."""
    e, r = fleet.engines[engine], fleet.requests[request]
    count = left(fleet, request)
    if e.batching == CHUNKED:
        count = min(count, budget)
    if count <= 0 or e.chunks >= fleet.chunk_request.shape[1]:
        return budget
    fleet.chunk_request[engine, e.chunks] = request
    fleet.chunk_count[engine, e.chunks] = count
    e.chunks += 1
    e.chunk_tokens += count
    e.chunk_pairs += count * r.computed + count * (count + 1) // 2
    return budget - count


@njit(cache=True)
def has_room(fleet: Fleet, engine: int) -> bool:
    e = fleet.engines[engine]
    return e.batch + e.joining + e.prefilling + e.reserved < e.places


@njit(cache=True)
def place(fleet: Fleet, engine: int, request: int, shareable_tokens: int) -> bool:
    """Take blocks for all its tokens, shared ones where its prefix is cached. False: there are not enough."""
    e, r = fleet.engines[engine], fleet.requests[request]
    found = matched(fleet, engine, request, shareable_tokens // e.block_tokens)
    needed = -(-(r.prompt + r.generated) // e.block_tokens) - found
    # One that was preempted comes back only with room for the others to grow, else it would go again at once.
    spare = e.batch + e.joining if r.preempted else 0
    if needed + spare + unheld(fleet, engine, request, found) > available(fleet, engine):
        return False
    hold(fleet, engine, request, found, needed)
    r.preempted = 0
    return True


@njit(cache=True)
def _span(fleet: Fleet, engine: int) -> int:
    """Decode steps until somebody has his last token, comes, or runs out of blocks."""
    e = fleet.engines[engine]
    most = fleet.counts[LONGEST_SPAN]
    for slot in range(e.batch):
        most = min(most, fleet.batch_ends[engine, slot] - e.steps)
    if e.batch * (most // e.block_tokens + 1) > available(fleet, engine):
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            if blocks_wanted(fleet, engine, middle) <= available(fleet, engine):
                low = middle
            else:
                high = middle - 1
        most = low
    coming_s = next_arrival_s(fleet, engine)
    if most > 1 and math.isfinite(coming_s):
        within_s = (coming_s - fleet.clock[NOW]) / e.slowness
        most = steps_to(fleet, e.times, e.batch, e.context_tokens, most, within_s)
    return most


@njit(cache=True)
def blocks_wanted(fleet: Fleet, engine: int, steps: int) -> int:
    """Blocks beyond those held now that the batch has taken by the last of so many steps."""
    e, wanted = fleet.engines[engine], 0
    for slot in range(e.batch):
        beyond = e.steps + steps - 1 - fleet.batch_room[engine, slot]
        if beyond > 0:
            wanted += (beyond + e.block_tokens - 1) // e.block_tokens
    return wanted


# ── what it leaves behind ──


@njit(cache=True)
def _complete(fleet: Fleet, engine: int) -> None:
    e = fleet.engines[engine]
    lasting_s = fleet.clock[NOW] - e.began_s
    _count_time(fleet, engine, lasting_s)
    if e.decodes > 0:
        _advance(fleet, engine, e.span_steps, lasting_s)
        request = _first_finished(fleet, engine)
        while request != NOBODY:
            finish(fleet, engine, request)
            request = _first_finished(fleet, engine)
    else:
        e.stall_s += lasting_s
    for index in range(e.chunks):
        request = fleet.chunk_request[engine, index]
        if request != NOBODY:
            _compute(fleet, engine, request, fleet.chunk_count[engine, index])
    e.span_steps = 0


@njit(cache=True)
def _first_finished(fleet: Fleet, engine: int) -> int:
    """In rank, of those who have had their last token: the order in which they give blocks back tells what is evicted first."""
    e, first = fleet.engines[engine], NOBODY
    for slot in range(e.batch):
        if fleet.batch_ends[engine, slot] == e.steps:
            request = fleet.batch_request[engine, slot]
            if first == NOBODY or goes_before(fleet, request, first):
                first = request
    return first


@njit(cache=True)
def _count_time(fleet: Fleet, engine: int, lasting_s: float) -> None:
    e = fleet.engines[engine]
    e.busy_s += lasting_s
    e.energy_j += step_j(fleet, e.times, e.chunk_tokens, e.chunk_pairs, e.decodes, lasting_s, e.span_steps)
    e.all_steps += e.span_steps
    weight = 1.0 - (1.0 - SMOOTHING) ** e.span_steps if e.step_s > 0.0 else 1.0
    e.step_s += weight * (lasting_s / e.span_steps - e.step_s)


@njit(cache=True)
def _advance(fleet: Fleet, engine: int, steps: int, lasting_s: float) -> None:
    """So many decode steps are done, which lasted so long. Nobody had his last token before the last of them."""
    e, now_s = fleet.engines[engine], fleet.clock[NOW]
    first_s = lasting_s
    if steps > 1:
        first_s = e.slowness * span_s(fleet, e.times, e.batch, e.context_tokens, 1)
        count_steps(fleet, engine, e.context_tokens, 1, steps)
    settled = e.batch - e.fresh
    if settled > 0:
        count_gap(fleet, first_s + e.stall_s, settled)
    for slot in range(settled, e.batch):
        count_gap(fleet, now_s - lasting_s + first_s - fleet.requests[fleet.batch_request[engine, slot]].last_s, 1)
    e.fresh, e.stall_s = 0, 0.0
    e.steps += steps
    e.context_tokens += steps * e.batch
    e.output_tokens += steps * e.batch
    for slot in range(e.batch):
        beyond = e.steps - 1 - fleet.batch_room[engine, slot]
        if beyond > 0:
            blocks = (beyond + e.block_tokens - 1) // e.block_tokens
            take(fleet, engine, fleet.batch_request[engine, slot], blocks)
            fleet.batch_room[engine, slot] += blocks * e.block_tokens
        if fleet.batch_share[engine, slot] <= e.steps:
            request, context = fleet.batch_request[engine, slot], fleet.batch_context[engine, slot]
            share(fleet, engine, request, (context + e.steps - 1) // e.block_tokens)
            fleet.batch_share[engine, slot] = _next_share(fleet, engine, request, context)


@njit(cache=True)
def _compute(fleet: Fleet, engine: int, request: int, count: int) -> None:
    """So much of a prompt is computed. With the last of it comes a token."""
    e, r = fleet.engines[engine], fleet.requests[request]
    r.computed += count
    e.waiting_tokens -= count
    e.prompt_tokens += count
    share(fleet, engine, request, r.computed // e.block_tokens)
    if left(fleet, request) > 0:
        return
    leave(fleet, engine, request)
    e.output_tokens += 1
    if r.task == PREFILL_ONLY:
        r.generated += 1
        r.state = ELSEWHERE
        release(fleet, engine, request)
        say(fleet, PREFILLED, engine, request)
        return
    _note_token(fleet, engine, request)
    r.generated += 1
    if r.generated >= r.output:
        end(fleet, engine, request)
    else:
        join(fleet, engine, request)


@njit(cache=True)
def _note_token(fleet: Fleet, engine: int, request: int) -> None:
    """It has a token now, which no decode step made. The first of each attempt is told."""
    r, now_s = fleet.requests[request], fleet.clock[NOW]
    if not r.told:
        r.told = 1
        say(fleet, FIRST_TOKEN, engine, request)
    if r.first_s < 0.0:
        r.first_s = now_s
    elif r.counted:
        count_gap(fleet, now_s - r.last_s, 1)
    r.last_s = now_s


@njit(cache=True)
def finish(fleet: Fleet, engine: int, request: int) -> None:
    """Out of the batch, with its last token."""
    leave_batch(fleet, engine, request)
    fleet.requests[request].last_s = fleet.clock[NOW]
    end(fleet, engine, request)


@njit(cache=True)
def end(fleet: Fleet, engine: int, request: int) -> None:
    release(fleet, engine, request)
    fleet.requests[request].state = ELSEWHERE
    count_end(fleet, request)
    say(fleet, FINISHED, engine, request)


@njit(cache=True)
def adopt(fleet: Fleet, engine: int, request: int) -> bool:
    """Go on with a RESERVED request, its KV here and its first token drawn. False where blocks for it are missing."""
    settle(fleet, engine)
    e, r = fleet.engines[engine], fleet.requests[request]
    more = -(-(r.prompt + r.generated - 1) // e.block_tokens) - r.blocks
    if more > available(fleet, engine):
        return False
    if more > 0:
        take(fleet, engine, request, more)
    e.reserved -= 1
    r.computed = r.prompt + r.generated - 1
    _note_token(fleet, engine, request)
    if r.generated >= r.output:
        end(fleet, engine, request)
    else:
        share(fleet, engine, request, r.computed // e.block_tokens)
        enter(fleet, engine, request, JOINING)
    interrupt(fleet, engine, fleet.clock[NOW])
    return True


@njit(cache=True)
def say(fleet: Fleet, kind: int, engine: int, request: int) -> None:
    said = fleet.said[fleet.counts[SAID_COUNT]]
    said.time_s, said.kind, said.engine, said.request, said.count, said.at = fleet.clock[NOW], kind, engine, request, 0, 0
    fleet.counts[SAID_COUNT] += 1


# ── when somebody comes or goes ──


@njit(cache=True)
def interrupt(fleet: Fleet, engine: int, at_s: float) -> None:
    """Something changes at `at_s`: the step under way then is the last of its span; who is idle begins then."""
    e = fleet.engines[engine]
    if e.span_steps == 0:
        if at_s < e.ends_s:
            e.ends_s = at_s
            schedule(fleet, engine)
        return
    if e.span_steps == 1 or at_s >= e.ends_s:
        return
    within_s = (at_s - e.began_s) / e.slowness
    steps = steps_to(fleet, e.times, e.batch, e.context_tokens, e.span_steps, within_s)
    if steps < e.span_steps:
        e.span_steps = steps
        e.ends_s = e.began_s + e.slowness * span_s(fleet, e.times, e.batch, e.context_tokens, steps)
        schedule(fleet, engine)


@njit(cache=True)
def settle(fleet: Fleet, engine: int) -> None:
    """Take the whole steps of a span that are over into the books; the one under way goes on, the last of its span."""
    e, now_s = fleet.engines[engine], fleet.clock[NOW]
    interrupt(fleet, engine, now_s)
    if e.span_steps <= 1:
        return
    done, ends_s = e.span_steps - 1, e.ends_s
    lasting_s = e.slowness * span_s(fleet, e.times, e.batch, e.context_tokens, done)
    fleet.clock[NOW] = e.began_s + lasting_s
    e.span_steps = done
    _count_time(fleet, engine, lasting_s)
    _advance(fleet, engine, done, lasting_s)
    e.began_s, e.ends_s, e.span_steps = fleet.clock[NOW], ends_s, 1
    fleet.clock[NOW] = now_s
    _find_blocks(fleet, engine)
    e.decodes = e.batch


@njit(cache=True)
def withdraw(fleet: Fleet, engine: int, request: int) -> None:
    """Take a request out, its blocks given back, wherever it is in the engine. What it has generated is written down."""
    settle(fleet, engine)
    e, r = fleet.engines[engine], fleet.requests[request]
    if r.state == DECODING:
        leave_batch(fleet, engine, request)
        e.decodes = min(e.decodes, e.batch)
    elif r.state == RESERVED:
        e.reserved -= 1
    else:
        for index in range(e.chunks if r.state == PREFILLING else 0):
            if fleet.chunk_request[engine, index] == request:
                fleet.chunk_request[engine, index] = NOBODY
        leave(fleet, engine, request)
    release(fleet, engine, request)
    r.state, r.computed, r.preempted = ELSEWHERE, 0, 0
    interrupt(fleet, engine, fleet.clock[NOW])
