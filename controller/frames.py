"""Snapshots as bytes: keyframes whole, the others as what changed since the one before.

What changes each second in a big fleet is its loads, so they are kept by column: every field of all replicas as one array of
differences, whose small numbers compress to a few bits each. Decoding gives the identical snapshot, to the last bit of a float.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from cluster.replica import Load, Phase
from cluster.snapshot import ClusterSnapshot, Demand, ReplicaState, Workload

COMPRESSION = 6
DECIMALS: Mapping[str, int] = {"at_s": 1, "load_age_s": 1, "step_s": 5, "power_w": 0, "overrun_share": 2}
"""Digits that the observer leaves of each figure; one with more is kept as a whole float."""
PHASES = tuple(Phase)
_COUNTS = ("sequence", "running", "waiting", "waiting_tokens", "kv_tokens", "kv_blocks_used")
_SHARED = ("nodes", "groups", "holds", "failed_starts")
_set = msgspec.structs.replace


class _Slide(msgspec.Struct, frozen=True, kw_only=True):
    """A workload whose buckets are the last one's, moved on."""

    workload: Workload
    """Without its buckets."""
    kept: int
    """Of the last one's buckets, its newest."""
    added: tuple[Demand, ...]


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
    old = {replica.replica_id: replica for replica in before.replicas}
    new = {replica.replica_id: replica for replica in snapshot.replicas}
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
        rows=tuple(_bare(replica) for name, replica in new.items() if name not in old or _bare(old[name]) != _bare(replica)),
        columns=_columns(snapshot.replicas, old),
    )
    return zlib.compress(msgspec.msgpack.encode(delta), COMPRESSION)


def decode(frame: bytes, before: ClusterSnapshot | None = None) -> ClusterSnapshot:
    """The snapshot that was encoded. Raises msgspec.DecodeError or zlib.error for what is no frame."""
    data = zlib.decompress(frame)
    if before is None:
        return msgspec.msgpack.decode(data, type=ClusterSnapshot)
    delta = msgspec.msgpack.decode(data, type=_Delta)
    old = {replica.replica_id: replica for replica in before.replicas}
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
        replicas=_with_loads(bare, delta.columns, old),
        **changed,
    )


def _bare(replica: ReplicaState) -> ReplicaState:
    return _set(replica, load=None, load_age_s=0.0)


def _slide(workload: Workload, before: ClusterSnapshot) -> _Slide:
    """The longest run of buckets that was there before, and what follows."""
    last = before.workload_by_model.get(workload.model)
    old = last.buckets if last is not None else ()
    most = min(len(old), len(workload.buckets))
    kept = next((count for count in range(most, 0, -1) if old[-count:] == workload.buckets[:count]), 0)
    return _Slide(workload=_set(workload, buckets=()), kept=kept, added=workload.buckets[kept:])


def _slid(slide: _Slide, before: ClusterSnapshot) -> Workload:
    old = before.workload_by_model[slide.workload.model].buckets if slide.kept else ()
    return _set(slide.workload, buckets=old[len(old) - slide.kept :] + slide.added)


def _columns(replicas: Sequence[ReplicaState], old: Mapping[str, ReplicaState]) -> dict[str, bytes]:
    """One array for each field of the loads, less what it was; who has no load counts as all zeros, and is told by `heard`."""
    before = [old.get(replica.replica_id) for replica in replicas]
    columns = {"heard": np.packbits(np.array([replica.load is not None for replica in replicas], bool)).tobytes()}
    for field in _COUNTS:
        columns[field] = _difference(_counts(replicas, field), _counts(before, field))
    columns["phase"] = _difference(_phases(replicas), _phases(before))
    for field, digits in DECIMALS.items():
        columns[field] = _decimals(_figures(replicas, field), _figures(before, field), digits)
    return columns


def _with_loads(
    bare: Sequence[ReplicaState], columns: Mapping[str, bytes], old: Mapping[str, ReplicaState]
) -> tuple[ReplicaState, ...]:
    before = [old.get(replica.replica_id) for replica in bare]
    heard = np.unpackbits(np.frombuffer(columns["heard"], np.uint8), count=len(bare))
    counts = {field: _sum(columns[field], _counts(before, field)) for field in _COUNTS}
    phases = _sum(columns["phase"], _phases(before))
    figures = {field: _undecimals(columns[field], _figures(before, field), digits) for field, digits in DECIMALS.items()}

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


def _counts(replicas: Sequence[ReplicaState | None], field: str) -> np.ndarray:
    return np.array([getattr(replica.load, field) if replica and replica.load else 0 for replica in replicas], np.int64)


def _phases(replicas: Sequence[ReplicaState | None]) -> np.ndarray:
    return np.array([PHASES.index(replica.load.phase) if replica and replica.load else 0 for replica in replicas], np.int64)


def _figures(replicas: Sequence[ReplicaState | None], field: str) -> np.ndarray:
    if field == "load_age_s":
        return np.array([replica.load_age_s if replica else 0.0 for replica in replicas], np.float64)
    return np.array([getattr(replica.load, field) if replica and replica.load else 0.0 for replica in replicas], np.float64)


def _difference(now: np.ndarray, before: np.ndarray) -> bytes:
    """Bytes of equal weight together: the high ones are nearly all alike."""
    difference = now - before
    zigzag = ((difference << 1) ^ (difference >> 63)).astype("<u8")
    return zigzag.view(np.uint8).reshape(-1, 8).T.tobytes()


def _sum(column: bytes, before: np.ndarray) -> np.ndarray:
    zigzag = np.frombuffer(column, np.uint8).reshape(8, -1).T.copy().view("<u8").reshape(-1).astype(np.int64)
    return ((zigzag >> 1) ^ -(zigzag & 1)) + before


def _decimals(now: np.ndarray, before: np.ndarray, digits: int) -> bytes:
    """Whole numbers of the last digit where that says it exactly, after a 1; else, after a 0, floats."""
    scale = 10.0**digits
    whole = np.rint(now * scale)
    if np.array_equal(whole / scale, now):
        return b"\1" + _difference(whole.astype(np.int64), np.rint(before * scale).astype(np.int64))
    return b"\0" + now.tobytes()


def _undecimals(column: bytes, before: np.ndarray, digits: int) -> np.ndarray:
    scale = 10.0**digits
    if column[:1] == b"\1":
        return _sum(column[1:], np.rint(before * scale).astype(np.int64)) / scale
    return np.frombuffer(column[1:], np.float64)
