"""Every request of a simulation as a row of a Parquet file, written in groups of rows, so that no more than one is held."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cluster.errors import InvalidConfig
from simulator.flight import Flight

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_ROWS = 2**16  # Some 10 MB while they are held; readers skip whole groups.
COMPLETED, REJECTED = "completed", "rejected"


class RequestsFile:
    """`ended` and `rejected` are for a Simulation; rows come as requests end. Leaving the context writes what is left."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidConfig where it cannot be written, or pyarrow is not installed."""
        try:
            import pyarrow as pa
            import pyarrow.parquet
        except ImportError as error:
            raise InvalidConfig("--parquet needs pyarrow, which is not installed: pip install 'mobula[parquet]'") from error
        self._pa, self._schema = pa, _schema(pa)
        try:
            self._writer = pyarrow.parquet.ParquetWriter(path, self._schema, compression="zstd")
        except OSError as error:
            raise InvalidConfig(f"--parquet {path}: cannot be written: {error.strerror or error}") from error
        self._rows: list[dict[str, Any]] = []
        self.written = 0

    def ended(self, flight: Flight, now_s: float) -> None:
        output = flight.output
        assert flight.first_s is not None or output == 1, "an answer without a first token"
        first_s = now_s if flight.first_s is None else flight.first_s
        self._add(
            flight,
            outcome=COMPLETED,
            ttft_s=first_s - flight.arrival_s,
            tpot_s=(now_s - first_s) / (output - 1) if output > 1 else None,
            e2e_s=now_s - flight.arrival_s,
        )

    def rejected(self, flight: Flight, why: str) -> None:
        """One that had its first token, and lost its replicas after it, keeps that token's time."""
        first_s = flight.first_s
        self._add(flight, outcome=REJECTED, reason=why, ttft_s=None if first_s is None else first_s - flight.arrival_s)

    def _add(self, flight: Flight, **found: object) -> None:
        trace, route = flight.trace, flight.route
        self._rows.append(
            {
                "arrival_s": flight.arrival_s,
                "prompt_tokens": trace.prompt_tokens,
                "output_tokens": flight.output,
                "cached_tokens": flight.cached,
                "tenant": trace.tenant,
                "slo_class": trace.slo_class,
                "priority": trace.priority,
                "queue_s": None if flight.sent_s is None else flight.sent_s - flight.arrival_s,
                "attempts": flight.attempt + 1,
                "decode_replica": None if route is None else route.decode.replica_id,
                "prefill_replica": None if route is None or route.prefill is None else route.prefill.replica_id,
                **found,
            }
        )
        if len(self._rows) == GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._pa.Table.from_pylist(self._rows, schema=self._schema))
            self.written += len(self._rows)
            self._rows.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._flush()
        self._writer.close()


def _schema(pa: Any) -> pa.Schema:
    """Seconds and tokens; prefill_replica is the one that the last route chose, null where the prompt was computed where it was
    decoded. tpot_s is null with one output token; latencies are null where a request did not get so far."""
    seconds, words, count = pa.float64(), pa.dictionary(pa.int32(), pa.string()), pa.int32()
    columns = {
        "arrival_s": seconds, "prompt_tokens": count, "output_tokens": count, "cached_tokens": count,
        "tenant": words, "slo_class": words, "priority": count, "outcome": words, "reason": words,
        "ttft_s": seconds, "tpot_s": seconds, "e2e_s": seconds, "queue_s": seconds, "attempts": count,
        "decode_replica": words, "prefill_replica": words,
    }  # fmt: skip
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])
