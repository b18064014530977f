"""Ray Serve's own autoscaling of emulated replicas, to compare with: a deployment that streams an engine's tokens, and its Ray.

Ray runs in a process of its own, as `mobula up` starts it, with as many nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse

from benchmarks.live_fleet import MODEL, free_port, model_in
from cluster.fleet import Fleet, ModelSpec, ReplicaGroup
from cluster.handoff import Token
from cluster.placement import NODE_LABEL, limits_of
from cluster.request import Request, SamplingParams
from workers.build_engine import build_engine
from workers.engines.engine import StepOutput, Submission
from workloads.client import Target

APPLICATION, DEPLOYMENT = "benchmark", "engine"
STARTING = ("STARTING", "PENDING_MIGRATION", "UPDATING", "RECOVERING")
HELD = (*STARTING, "RUNNING", "STOPPING")
DOWN_S = 60.0


class EngineReplica:
    """One emulated engine behind a streaming /v1/completions."""

    def __init__(self, group: ReplicaGroup, model: ModelSpec) -> None:
        from gateway.serve_process import stay_on_loopback  # Imports Ray, which reads its environment once.

        stay_on_loopback()
        self._queues: dict[str, asyncio.Queue[Token]] = {}
        self._loop = asyncio.get_event_loop()
        self._engine = build_engine(group, model)
        self._engine.start(self._sink)
        self._engine.warm()

    def _sink(self, output: StepOutput) -> None:
        self._loop.call_soon_threadsafe(self._spread, output.tokens)

    def _spread(self, tokens: tuple[Token, ...]) -> None:
        for token in tokens:
            if token.request_id in self._queues:
                self._queues[token.request_id].put_nowait(token)

    async def __call__(self, http: HttpRequest) -> StreamingResponse:
        asked = await http.json()
        sampling = SamplingParams(max_tokens=asked["max_tokens"])
        request = Request(request_id=uuid.uuid4().hex, model=MODEL, prompt=tuple(asked["prompt"]), sampling=sampling)
        self._queues[request.request_id] = asyncio.Queue()
        self._engine.submit(Submission(request=request))
        return StreamingResponse(self._events(request.request_id), media_type="text/event-stream")

    async def _events(self, request_id: str) -> AsyncIterator[bytes]:
        queue = self._queues[request_id]
        try:
            finish = None
            while finish is None:
                token = await queue.get()
                finish = token.finish
                yield _event({"choices": [{"text": token.text, "finish_reason": finish}]})
            yield _event({"choices": [], "usage": {"completion_tokens": token.index + 1}})
            yield b"data: [DONE]\n\n"
        finally:
            del self._queues[request_id]
            self._engine.abort(request_id)


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


class ServeArm:
    """One that is up."""

    def __init__(self, pipe: Connection, url: str) -> None:
        self._pipe = pipe
        self.target = Target(url=url, model=MODEL)

    def count(self) -> tuple[int, int]:
        """Replicas that take a place, and those of them that serve. Blocks for some milliseconds."""
        self._pipe.send("count")
        states = self._pipe.recv()
        return sum(states[state] for state in HELD), states["RUNNING"]


@contextlib.contextmanager
def serve_arm(fleet: Fleet) -> Iterator[ServeArm]:
    """Serve with what the fleet's one group has: its engine, its count at first, its least and most."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory(prefix="mobula-bench-", dir="/tmp") as directory:
        process = context.Process(target=_run, args=(msgspec.msgpack.encode(fleet), directory, port, theirs))
        process.start()
        theirs.close()  # Else a process that dies at its start would leave us waiting for its word.
        try:
            ours.recv()
            yield ServeArm(ours, f"http://127.0.0.1:{port}")
        finally:
            ours.close()
            process.join(DOWN_S)
            process.kill()


def _run(fleet_data: bytes, directory: str, port: int, pipe: Connection) -> None:
    """Answers with replicas by state until the pipe is closed."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Ray and Serve print; stdout is for what is measured.
    from cli.local_ray import LocalRay, adopt_orphans

    fleet = msgspec.msgpack.decode(fleet_data, type=Fleet)
    adopt_orphans()
    local = LocalRay(fleet.nodes, NODE_LABEL, Path(directory))
    try:
        _deploy(fleet.replicas[0], model_in(directory), port)
        pipe.send("up")
        with contextlib.suppress(EOFError):
            while pipe.recv():
                pipe.send(_states())
    finally:
        local.stop()


def _deploy(group: ReplicaGroup, model: ModelSpec, port: int) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation

    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=HTTPOptions(host="127.0.0.1", port=port))
    least, most = limits_of(group)
    deployment = serve.deployment(
        EngineReplica,
        name=DEPLOYMENT,
        num_replicas="auto",
        autoscaling_config={"min_replicas": least, "max_replicas": most, "initial_replicas": group.count},
        ray_actor_options={"num_cpus": 0},
    )
    serve.run(deployment.bind(group, model), name=APPLICATION, route_prefix="/")


def _states() -> Counter[str]:
    from ray import serve

    states = serve.status().applications[APPLICATION].deployments[DEPLOYMENT].replica_states
    return Counter({getattr(state, "value", state): count for state, count in states.items()})
