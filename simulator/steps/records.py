"""The fleet's state as arrays of records, which the compiled functions beside this file read and write.

An *engine* here is the inside of one replica: its queue, batch and block pool. Indices of -1 end a list or name nobody. Everything
that grows is grown by `simulator.engines`, between calls.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NOBODY = -1
NEVER = 2**62

CHUNKED, PROMPTS_FIRST, WHOLE_PROMPTS = range(3)
"""How a step is made up. CHUNKED: all decodes, then prompts in chunks, within a token budget (Sarathi-Serve, OSDI'24; our engines).
PROMPTS_FIRST: while prompts can be placed, steps of whole prompts alone, decodes wait (vLLM before chunking; DistServe, OSDI'24,
section 2). WHOLE_PROMPTS: all decodes and whole prompts together; decodes wait while a prompt is computed that
leaves them no room in the budget (Orca, OSDI'22, where there is no budget; Splitwise's machines, ISCA'24)."""

FREE, WAITING, PREFILLING, RESERVED, JOINING, DECODING, ELSEWHERE = range(7)
"""Where a request is. FREE: its row may be given away. ELSEWHERE: in no engine. JOINING: it decodes from the next step on."""

WHOLE, PREFILL_ONLY = range(2)
"""What an engine is to do with a request."""

FIRST_TOKEN, FINISHED, PREFILLED, STORED, REMOVED = range(5)
"""What is said. PREFILLED: the prompt of a PREFILL_ONLY request is done. STORED and REMOVED tell of shareable blocks."""

ENGINE = np.dtype(
    [
        ("budget", "i4"),
        ("places", "i4"),
        ("kv_blocks", "i4"),
        ("block_tokens", "i4"),
        ("batching", "i4"),
        ("times", "i4"),  # Its row of `Fleet.scalars` and `Fleet.knots`.
        ("slowness", "f8"),  # Factor on all step times.
        # The span of equal steps under way. Chunks and decodes of it are in the arrays below.
        ("began_s", "f8"),
        ("ends_s", "f8"),  # Infinite when idle.
        ("span_steps", "i8"),
        ("decodes", "i4"),  # Sequences that decode in it; 0 or `batch`.
        ("chunks", "i4"),
        ("chunk_tokens", "i8"),
        ("chunk_pairs", "i8"),
        ("batch", "i4"),  # Sequences that decode, those JOINING not among them.
        ("fresh", "i4"),  # Of those at the batch's end, so many have not had a decode step here.
        ("steps", "i8"),  # Decode steps done.
        ("context_tokens", "i8"),  # Of the batch, after those steps.
        ("stall_s", "f8"),  # Since the last decode step, in steps of prompts alone.
        ("first_waiting", "i4"),
        ("last_waiting", "i4"),
        ("first_prefilling", "i4"),
        ("last_prefilling", "i4"),
        ("first_joining", "i4"),
        ("waiting", "i4"),
        ("prefilling", "i4"),
        ("joining", "i4"),
        ("reserved", "i4"),
        ("waiting_tokens", "i8"),  # Prompt tokens of waiting and prefilling requests not computed yet.
        ("joining_tokens", "i8"),
        ("latest_s", "f8"),  # When the last of the waiting comes.
        ("used", "i4"),  # Blocks held.
        ("cached", "i4"),  # Blocks that nobody holds and somebody may share.
        ("oldest", "i4"),  # Of the cached, the next to go.
        ("newest", "i4"),
        ("order", "i8"),
        ("place", "i4"),  # In the calendar's heap.
        # Counters since the start.
        ("busy_s", "f8"),
        ("energy_j", "f8"),  # Of steps.
        ("prompt_tokens", "i8"),
        ("cached_tokens", "i8"),
        ("output_tokens", "i8"),
        ("preemptions", "i8"),
        ("all_steps", "i8"),
        ("step_s", "f8"),  # Mean of the latest.
    ],
    align=True,
)

REQUEST = np.dtype(
    [
        ("arrival_s", "f8"),  # At the gateway.
        ("queued_s", "f8"),  # At the engine: not before it does it exist there.
        ("started_s", "f8"),
        ("first_s", "f8"),  # Of the first token, and of the latest known one; -1 before.
        ("last_s", "f8"),
        ("prompt", "i4"),
        ("output", "i4"),
        ("generated", "i4"),  # While it decodes, as of its joining the batch.
        ("computed", "i4"),  # Tokens whose KV is in blocks; while it decodes, as of its joining.
        ("cached", "i4"),  # Of the prompt, found when it was first placed; -1 before.
        ("priority", "i4"),
        ("order", "i8"),
        ("engine", "i4"),
        ("slot", "i4"),  # In the batch.
        ("state", "i4"),
        ("task", "i4"),
        ("preempted", "i4"),
        ("preemptions", "i4"),
        ("before", "i4"),
        ("after", "i4"),
        ("blocks", "i4"),  # Held in all.
        ("shared", "i4"),  # Full blocks at the front that others can find, or that were found.
        ("hashes_at", "i8"),  # In the arena.
        ("hashes", "i4"),
        ("public", "i4"),  # So many of them at the front others can ask for: they are told of.
        ("told", "i4"),  # Whether this attempt's first token was.
        ("slo_class", "i4"),
        ("counted", "i4"),  # Whether it counts in the results: it arrived after the warm-up.
    ],
    align=True,
)

ENTRY = np.dtype(
    [
        ("hash", "u8"),
        ("engine", "i4"),
        ("holders", "i4"),
        ("public", "i4"),
        ("older", "i4"),  # Of the cached ones of its engine; while free, the next free one.
        ("newer", "i4"),
    ],
    align=True,
)
"""One shareable block of one engine."""

SAID = np.dtype(
    [("time_s", "f8"), ("kind", "i4"), ("engine", "i4"), ("request", "i4"), ("count", "i4"), ("at", "i8")],
    align=True,
)
"""One thing said. count, at: of STORED and REMOVED, hashes in `Fleet.said_hashes`."""

STEP_S, PAIR_S, MIXED_FACTOR, IDLE_W, PREFILL_W, STEP_J, SCALARS = range(7)
"""Columns of `Fleet.scalars`. MIXED_FACTOR 0 is none. STEP_J: joules of a step beside what its watts say."""

PREFILL, DECODE, KV, DECODE_W, FUNCTIONS = range(5)
"""The piecewise linear functions of a performance model."""

ENTRIES_USED, ENTRIES_FREE, SAID_COUNT, SAID_HASHES, HEAP, TELLING, LONGEST_SPAN, UNSHARED, COUNTS = range(9)
"""Of `Fleet.counts`. ENTRIES_FREE: head of the free list. TELLING: 1 if blocks are told of. LONGEST_SPAN: steps, 1 to step every
one. UNSHARED: blocks that nobody could find for want of entries; 0 unless growth was forgotten."""

TTFT, TPOT, ITL, E2E, SKETCHES = range(5)

ENDED, KEPT, PROMPT_TOKENS, OUTPUT_TOKENS, CACHED_TOKENS, TALLIES = range(6)
"""Columns of `Fleet.tallies`, sums over counted requests that ended, by SLO class."""


class Fleet(NamedTuple):
    """All of it."""

    engines: NDArray[np.void]
    requests: NDArray[np.void]
    batch_request: NDArray[np.int32]
    """[engines, places]: who decodes."""
    batch_ends: NDArray[np.int64]
    """[engines, places]: the engine's `steps` at which each has its last token."""
    batch_context: NDArray[np.int64]
    """[engines, places]: each one's tokens, prompt and output, less the engine's `steps`."""
    batch_room: NDArray[np.int64]
    """[engines, places]: the largest `steps` before whose step its blocks suffice."""
    batch_share: NDArray[np.int64]
    """[engines, places]: the `steps` after which it has one more full block for others to find."""
    chunk_request: NDArray[np.int32]
    """[engines, places]: whose prompts the step under way computes, and how much of each."""
    chunk_count: NDArray[np.int32]
    heap: NDArray[np.int32]
    """[engines]: engines that compute, by when their span ends."""
    entries: NDArray[np.void]
    table: NDArray[np.int32]
    """[a power of two]: entries by hash and engine."""
    arena: NDArray[np.uint64]
    """Block hashes of requests in flight: of the prompt, and of the output where that is to be found again."""
    held: NDArray[np.int32]
    """[arena]: the entry that each of those holds, -1 where its block is nobody else's to find."""
    said: NDArray[np.void]
    said_hashes: NDArray[np.uint64]
    scalars: NDArray[np.float64]
    """[models, SCALARS]"""
    knots: NDArray[np.float64]
    """[models, FUNCTIONS, knots, 3]: from, value there, slope from there on."""
    knot_counts: NDArray[np.int32]
    """[models, FUNCTIONS]"""
    counts: NDArray[np.int64]
    clock: NDArray[np.float64]
    """[3]: now, since when requests count, seconds on a token's way to its client."""
    sketches: NDArray[np.int64]
    """[classes, SKETCHES, buckets]; ITL under class 0."""
    slos: NDArray[np.float64]
    """[classes, 3]: TTFT, TPOT and E2E; infinite where there is no bound."""
    tallies: NDArray[np.int64]
    """[classes, TALLIES]"""


NOW, COUNTED_FROM, REPLY_S = range(3)
