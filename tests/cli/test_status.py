"""Claims about the table of `mobula status`."""

from io import StringIO

from rich.console import Console

from cli.fleet_home import FleetStatus, ReplicaStatus
from cli.status import table

READY = ReplicaStatus(
    replica_id="decode-a100-80g-10", role="decode", phase="ready", model="tiny", node="node-a", worker_id="worker-1", pid=1234567,
    running=64, waiting=256, kv_blocks_used=1024, kv_blocks=2048, step_s=0.0216, power_w=381.0,
)  # fmt: skip
LOST = ReplicaStatus(
    replica_id="decode-a100-80g-11", role="decode", phase="lost", model="tiny", node="node-a", worker_id="worker-2"
)


def lines(*replicas: ReplicaStatus) -> list[str]:
    console = Console(file=StringIO(), width=80)
    console.print(table(FleetStatus(fleet="demo", url="http://127.0.0.1:8000", version=1, replicas=replicas)))
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_eighty_columns_show_every_cell():
    assert "decode-a100-80g-10 decode ready node-a 1234567 64 256 50% 21.6 ms 381 W" in lines(READY)


def test_of_a_lost_replica_no_load_is_made_up():
    assert "decode-a100-80g-11 decode lost node-a - - - - - -" in lines(READY, LOST)
