"""Claims about what `mobula status` shows."""

from io import StringIO

import msgspec
import pytest
from rich.console import Console

from cli import status as command
from cli.main import main
from cli.status import fitted, screen
from cluster.slo import Slo
from cluster.snapshot import Hold, Latency
from controller.status import Change, FleetStatus, GroupStatus, HeldBack, ModelStatus, NodeStatus, ReplicaStatus
from tests.cli.fake_answerer import FakeAnswerer

READY = ReplicaStatus(
    replica_id="decode-a100-spot-10", group="tiny/decode/a100-spot", role="decode", phase="ready", model="tiny", node="spot-a",
    worker_id="worker-1", pid=1234567, running=64, waiting=256, kv_blocks_used=1024, kv_blocks=2048, step_s=0.0216, power_w=381.0,
)  # fmt: skip
LOST = ReplicaStatus(replica_id="decode-a100-spot-11", group="tiny/decode/a100-spot", role="decode", phase="lost", node="spot-a")
NODE = NodeStatus(
    name="spot-a", pool="a100-spot", accelerator="a100-80g", market="spot", zone="a", power_domain="row-b", slots=4, replicas=1,
    price_usd_per_hour=1.5, alive=True, power_w=381.0,
)  # fmt: skip
MODEL = ModelStatus(
    model="tiny", rate_rps=4.25, queued=3, in_flight=12, slo=Slo(ttft_s=0.5, tpot_s=0.1), attainment=0.974, age_s=0.5,
    ttft=Latency(p50_s=0.1, p90_s=0.2, p99_s=0.612), tpot=None,
)  # fmt: skip
STATUS = FleetStatus(
    fleet="demo", url="http://127.0.0.1:8000", version=1, epoch=2, mode="act", pass_number=77, now_s=0.0, power_w=381.0,
    price_usd_per_hour=3.0, used_usd_per_hour=1.5, nodes=(NODE,), models=(MODEL,), replicas=(READY, LOST),
    groups=(GroupStatus(name="tiny/decode/a100-spot", wanted=2, ready=1, min_replicas=1, max_replicas=4),),
    holds=(Hold(kind="pin", target="tiny/decode/a100-spot", replicas=2, author="ada", expires_s=0.0),),
    changes=(Change(number=3, at_s=0.0, text="start decode-a100-spot-11 on spot-a", reason="1 do not carry 9.00/s: TPOT"),),
)  # fmt: skip


def lines(status: FleetStatus) -> list[str]:
    console = Console(file=StringIO(), width=80)
    console.print(screen(status))
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_eighty_columns_show_every_cell():
    shown = lines(STATUS)
    assert "decode-a100-spot-10 decode ready spot-a 64 256 50% 21.6 ms 381 W" in shown
    assert "spot-a a100-spot spot a 1/4 381 W 1.50" in shown
    assert "tiny 4.25/s 3 12 612 ms of 500 - 97.4%" in shown
    assert "tiny/decode/a100-spot 1 2 1 4" in shown


def test_of_a_lost_replica_no_load_is_made_up():
    assert "decode-a100-spot-11 decode lost spot-a - - - - -" in lines(STATUS)


def test_hands_cost_and_last_decisions_are_told():
    text = " ".join(lines(STATUS))
    assert "$1.50/h in use of $3.00/h" in text
    assert "pin tiny/decode/a100-spot to 2 by ada until" in text
    assert "start decode-a100-spot-11 on spot-a: 1 do not carry 9.00/s: TPOT" in text


def test_what_became_of_a_decision_and_what_is_held_back_are_told():
    failed = msgspec.structs.replace(STATUS.changes[0], outcome="failed: node spot-a is down")
    held = HeldBack(text="tiny/decode/a100-spot to 3", by="Expansion", why="1 of 1 not started: starts failed 5 times")
    text = " ".join(lines(msgspec.structs.replace(STATUS, changes=(failed,), held_back=(held,), nonsense=2)))
    assert "1 do not carry 9.00/s: TPOT; failed: node spot-a is down" in text
    assert "held back: tiny/decode/a100-spot to 3: 1 of 1 not started: starts failed 5 times (Expansion)" in text
    assert "2 load reports could not be" in text


def test_figures_of_telemetry_that_is_stale_are_not_shown_as_if_they_were_true():
    shown = lines(msgspec.structs.replace(STATUS, models=(msgspec.structs.replace(MODEL, age_s=81.0, stale=True),)))
    assert "tiny" + 6 * " unknown" in shown
    assert "telemetry of tiny is 81 s old: its rate and latencies are unknown" in shown
    never = lines(msgspec.structs.replace(STATUS, models=(msgspec.structs.replace(MODEL, age_s=1.7e9, stale=True),)))
    assert "telemetry of tiny is not there yet: its rate and latencies are unknown" in never


def test_a_watched_screen_leaves_room_for_the_last_decisions_on_a_small_terminal():
    many = (*tuple(msgspec.structs.replace(LOST, replica_id=f"a-{n}") for n in range(30)), READY)
    console = Console(file=StringIO(), width=80, height=40)
    console.print(fitted(msgspec.structs.replace(STATUS, replicas=many), console))
    shown = console.file.getvalue().splitlines()
    assert len(shown) < 40
    assert any("decode-a100-spot-10" in line for line in shown)
    assert any("start decode-a100-spot-11" in line for line in shown)


def test_watched_in_a_pipe_each_look_is_printed(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys):
    def interrupted(_: float) -> None:
        looks.append(1)
        if len(looks) == 3:
            raise KeyboardInterrupt

    looks: list[int] = []
    monkeypatch.setenv("MOBULA_HOME", str(tmp_path))
    monkeypatch.setattr(command.time, "sleep", interrupted)
    with FakeAnswerer("demo", {"status": lambda _: STATUS}), pytest.raises(SystemExit) as ended:
        main(["status", "--watch"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("demo at http://127.0.0.1:8000: act, pass 77") == 3


def test_more_replicas_than_a_screen_holds_are_counted():
    many = tuple(ReplicaStatus(replica_id=f"r-{n}", group="g", role="mixed", phase="ready", node="n") for n in range(45))
    assert "and 5 more" in lines(msgspec.structs.replace(STATUS, replicas=many))
