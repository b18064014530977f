"""Snapshots as bytes: keyframes whole, the others as what changed since the one before.

What changes each second in a big fleet is its loads, so they are kept by column: every field of all replicas as one array of
differences, whose small numbers compress to a few bits each. Decoding gives the identical snapshot, to the last bit of a float.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

from cluster.replica import Load, Phase
from cluster.snapshot import ClusterSnapshot, Demand, ReplicaState, Workload

COMPRESSION = 6
DECIMALS: Mapping[str, int] = {"at_s": 1, "load_age_s": 1, "step_s": 5, "slowdown": 2, "power_w": 0, "overrun_share": 2}
BUCKET_DECIMALS: Mapping[str, int] = {
    "requests": 3,
    "prompt_tokens": 1,
    "prompt_tokens_squared": 1,
    "cached_tokens": 1,
    "output_tokens": 1,
}
"""Digits that the observer leaves of each figure; a column with more is kept as whole floats."""
WHOLE = 2.0**53  # Below it doubles tell whole numbers apart.
PHASES = tuple(Phase)
_COUNTS = ("sequence", "running", "waiting", "waiting_tokens", "kv_tokens", "kv_blocks_used")
_FIELDS = (*_COUNTS, "phase", *(field for field in DECIMALS if field != "load_age_s"))
_fields = attrgetter(*_FIELDS)
_NO_LOAD = tuple(PHASES[0] if field == "phase" else 0 for field in _FIELDS)
_PHASE_NUMBERS = {phase: number for number, phase in enumerate(PHASES)}
_SHARED = ("nodes", "groups", "holds", "failed_starts")
_facts = attrgetter(*(field for field in ReplicaState.__struct_fields__ if field not in ("load", "load_age_s")))
_set = msgspec.structs.replace


class _Slide(msgspec.Struct, frozen=True, kw_only=True):
    """A workload whose buckets are the last one's, moved on."""

    workload: Workload
    """Without its buckets."""
    count: int
    kept: int
    """Of the last one's buckets, its newest."""
    columns: dict[str, bytes]


class _Delta(msgspec.Struct, frozen=True, kw_only=True):
    now_s: float
    pass_number: int
    next_replica: int
    changed: dict[str, msgspec.Raw]
    """Fields of the snapshot that are not as before, of those in `_SHARED`."""
    workloads: tuple[_Slide, ...]
    gone: tuple[str, ...]
    rows: tuple[ReplicaState, ...]
    """Replicas that are new, or not as before but for their load."""
    columns: dict[str, bytes]


def encode(snapshot: ClusterSnapshot, before: ClusterSnapshot | None = None) -> bytes:
    """A frame; to be decoded with the same `before`."""
    if before is None:
        return zlib.compress(msgspec.msgpack.encode(snapshot), COMPRESSION)
    old, new = before.replica_by_id, snapshot.replica_by_id
    delta = _Delta(
        now_s=snapshot.now_s,
        pass_number=snapshot.pass_number,
        next_replica=snapshot.next_replica,
        changed={
            field: msgspec.Raw(msgspec.msgpack.encode(getattr(snapshot, field)))
            for field in _SHARED
            if getattr(snapshot, field) != getattr(before, field)
        },
        workloads=tuple(_slide(workload, before) for workload in snapshot.workloads),
        gone=tuple(name for name in old if name not in new),
        rows=tuple(_bare(replica) for name, replica in new.items() if name not in old or _facts(old[name]) != _facts(replica)),
        columns=_columns(snapshot.replicas, old, snapshot.now_s),
    )
    return zlib.compress(msgspec.msgpack.encode(delta), COMPRESSION)


def decode(frame: bytes, before: ClusterSnapshot | None = None) -> ClusterSnapshot:
    """The snapshot that was encoded. Raises msgspec.DecodeError or zlib.error for what is no frame."""
    data = zlib.decompress(frame)
    if before is None:
        return msgspec.msgpack.decode(data, type=ClusterSnapshot)
    delta = msgspec.msgpack.decode(data, type=_Delta)
    old = before.replica_by_id
    rows = {name: _bare(replica) for name, replica in old.items() if name not in delta.gone}
    rows.update({replica.replica_id: replica for replica in delta.rows})
    bare = [rows[name] for name in sorted(rows)]
    kinds = {field.name: field.type for field in msgspec.structs.fields(ClusterSnapshot)}
    changed: dict[str, Any] = {name: msgspec.msgpack.decode(raw, type=kinds[name]) for name, raw in delta.changed.items()}
    return _set(
        before,
        now_s=delta.now_s,
        pass_number=delta.pass_number,
        next_replica=delta.next_replica,
        workloads=tuple(_slid(slide, before) for slide in delta.workloads),
        replicas=_with_loads(bare, delta.columns, old, delta.now_s),
        **changed,
    )


def _bare(replica: ReplicaState) -> ReplicaState:
    return _set(replica, load=None, load_age_s=0.0)


def _slide(workload: Workload, before: ClusterSnapshot) -> _Slide:
    """Kept is the longest run of counts that was there before."""
    last = before.workload_by_model.get(workload.model)
    old, now = _demand(last), _demand(workload)
    counts, had = now["requests"].tolist(), old["requests"].tolist()
    kept = next((count for count in range(min(len(had), len(counts)), 0, -1) if had[-count:] == counts[:count]), 0)
    predicted = _predicted(old, kept, len(counts))
    columns = {field: _decimals(now[field], predicted[field], digits) for field, digits in BUCKET_DECIMALS.items()}
    bare = _set(workload, buckets=())
    return _Slide(workload=bare, count=len(counts), kept=kept, columns=columns)


def _slid(slide: _Slide, before: ClusterSnapshot) -> Workload:
    old = _demand(before.workload_by_model.get(slide.workload.model))
    predicted = _predicted(old, slide.kept, slide.count)
    columns = [_undecimals(slide.columns[field], predicted[field], digits).tolist() for field, digits in BUCKET_DECIMALS.items()]
    buckets = (Demand(**dict(zip(BUCKET_DECIMALS, row, strict=True))) for row in zip(*columns, strict=True))
    return _set(slide.workload, buckets=tuple(buckets))


def _predicted(old: Mapping[str, np.ndarray], kept: int, count: int) -> dict[str, np.ndarray]:
    return {field: np.concatenate((values[len(values) - kept :], np.zeros(count - kept))) for field, values in old.items()}


def _demand(workload: Workload | None) -> dict[str, np.ndarray]:
    """Each field of the buckets as one array."""
    buckets = workload.buckets if workload is not None else ()
    return {field: np.array([getattr(bucket, field) for bucket in buckets], np.float64) for field in BUCKET_DECIMALS}


def _columns(replicas: Sequence[ReplicaState], old: Mapping[str, ReplicaState], now_s: float) -> dict[str, bytes]:
    """One array for each field of the loads, less what it was; who has no load counts as all zeros, and is told by `heard`."""
    now, before = _table(replicas), _table([old.get(replica.replica_id) for replica in replicas])
    before["load_age_s"] = now_s - now["at_s"]  # But for unequal clocks and the way here.
    columns = {"heard": np.packbits(np.array([replica.load is not None for replica in replicas], bool)).tobytes()}
    columns |= {field: _difference(now[field] - before[field]) for field in (*_COUNTS, "phase")}
    columns |= {field: _decimals(now[field], before[field], digits) for field, digits in DECIMALS.items()}
    return columns


def _with_loads(
    bare: Sequence[ReplicaState], columns: Mapping[str, bytes], old: Mapping[str, ReplicaState], now_s: float
) -> tuple[ReplicaState, ...]:
    before = _table([old.get(replica.replica_id) for replica in bare])
    heard = np.unpackbits(np.frombuffer(columns["heard"], np.uint8), count=len(bare))
    counts = {field: before[field] + _undifferenced(columns[field], len(bare)) for field in _COUNTS}
    phases = before["phase"] + _undifferenced(columns["phase"], len(bare))
    figures: dict[str, np.ndarray] = {}
    for field, digits in DECIMALS.items():
        before["load_age_s"] = now_s - figures.get("at_s", before["at_s"])
        figures[field] = _undecimals(columns[field], before[field], digits)

    def whole(index: int, replica: ReplicaState) -> ReplicaState:
        if not heard[index]:
            return _set(replica, load_age_s=float(figures["load_age_s"][index]))
        load = Load(
            replica_id=replica.replica_id,
            phase=PHASES[phases[index]],
            **{field: int(values[index]) for field, values in counts.items()},
            **{field: float(values[index]) for field, values in figures.items() if field != "load_age_s"},
        )
        return _set(replica, load=load, load_age_s=float(figures["load_age_s"][index]))

    return tuple(whole(index, replica) for index, replica in enumerate(bare))


def _table(replicas: Sequence[ReplicaState | None]) -> dict[str, np.ndarray]:
    """Each field of the loads as one array, int64 or float64."""
    rows = [_NO_LOAD if replica is None or replica.load is None else _fields(replica.load) for replica in replicas]
    columns = dict(zip(_FIELDS, zip(*rows, strict=True) if rows else [()] * len(_FIELDS), strict=True))
    columns["phase"] = [_PHASE_NUMBERS[phase] for phase in columns["phase"]]
    columns["load_age_s"] = [0.0 if replica is None else replica.load_age_s for replica in replicas]
    return {field: np.array(values, np.float64 if field in DECIMALS else np.int64) for field, values in columns.items()}


def _difference(difference: np.ndarray) -> bytes:
    """Small numbers of either sign as small ones, in as many bytes as the largest takes: first how many, then those of equal weight
    together, since the high ones are nearly all alike."""
    zigzag = ((difference << 1) ^ (difference >> 63)).astype("<u8")
    width = (int(zigzag.max(initial=0)).bit_length() + 7) // 8
    return bytes((width,)) + zigzag.view(np.uint8).reshape(-1, 8)[:, :width].T.tobytes()


def _undifferenced(column: bytes, count: int) -> np.ndarray:
    planes = np.zeros((count, 8), np.uint8)
    planes[:, : column[0]] = np.frombuffer(column, np.uint8, offset=1).reshape(column[0], count).T
    zigzag = planes.view("<u8").reshape(-1)
    return (zigzag >> np.uint64(1)).astype(np.int64) ^ -(zigzag & np.uint64(1)).astype(np.int64)


def _decimals(now: np.ndarray, before: np.ndarray, digits: int) -> bytes:
    """Whole numbers of the last digit where that says it exactly, after a 1; else, after a 0, floats."""
    scale = 10.0**digits
    whole = np.rint(now * scale)
    if np.array_equal(whole / scale, now) and np.abs(whole).max(initial=0.0) < WHOLE:
        return b"\1" + _difference(whole.astype(np.int64) - np.rint(before * scale).astype(np.int64))
    return b"\0" + now.tobytes()


def _undecimals(column: bytes, before: np.ndarray, digits: int) -> np.ndarray:
    scale = 10.0**digits
    if column[:1] == b"\1":
        return (np.rint(before * scale).astype(np.int64) + _undifferenced(column[1:], len(before))) / scale
    return np.frombuffer(column[1:], np.float64)
