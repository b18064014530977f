"""What was broken on purpose is named."""

from __future__ import annotations

import subprocess
import sys

import msgspec

from cli.faults import Faults
from tests.cli.test_status import READY, STATUS


def test_the_first_replica_is_named_where_none_was():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        status = msgspec.structs.replace(STATUS, replicas=(msgspec.structs.replace(READY, pid=process.pid),))
        said = Faults(object()).kill("worker", "", status)
        assert said == f"SIGKILL to {process.pid}, the worker of decode-a100-spot-10"
