"""What a simulated replica says of itself is what a live one would: here, of requests whose KV is on its way."""

from __future__ import annotations

import numpy as np

from cluster.performance import PerformanceModel
from simulator.engines import Engines
from simulator.steps.engines import RUNNING, WAITS

PERFORMANCE = PerformanceModel(step_s=0.01, prefill_token_s=1e-4, sequence_s=1e-4)


def test_a_request_whose_kv_is_on_its_way_waits():
    """`workers.replica` counts what it pulls as waiting, and gateways take it for a sequence of the batch."""
    engines = Engines()
    engine = engines.add(model=engines.model(PERFORMANCE), kv_blocks=64, block_tokens=16, max_running=8, step_budget_tokens=512)
    request = engines.request(arrival_s=0.0, prompt=100, output=10)
    assert engines.reserve(request, engine, 0.0)
    load = engines.loads(np.array([engine], np.int32), 0.0)[0]
    assert (load[RUNNING], load[WAITS]) == (0, 1)

    engines.state.requests["generated"][request] = 1
    assert engines.take_over(request, 0.0)
    load = engines.loads(np.array([engine], np.int32), 0.0)[0]
    assert (load[RUNNING], load[WAITS]) == (1, 0)
