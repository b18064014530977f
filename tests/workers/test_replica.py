"""What an engine says reaches the gateway, whichever way its thread and the loop's meet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from cluster.fleet import ModelSpec, ReplicaGroup
from cluster.handoff import Token
from cluster.placement import ReplicaPlan
from cluster.replica import Role
from transports.messages import Tokens
from workers.engines.engine import StepOutput
from workers.replica import HostedReplica


class Outbox:
    def __init__(self) -> None:
        self.sent: list[object] = []

    def send(self, message: object) -> None:
        self.sent.append(message)


class SilentEngine:
    def start(self, sink) -> None:
        self.say = sink

    def cached_blocks(self):
        return ()


class Loop:
    """Runs what it was given when told to."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def is_closed(self) -> bool:
        return False

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        self._calls.append(call)

    def run(self) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            call()


def test_what_is_said_while_the_queue_is_emptied_is_sent_too():
    engine, outbox, loop = SilentEngine(), Outbox(), Loop()
    plan = ReplicaPlan(replica_id="r", group=ReplicaGroup(role=Role.MIXED), model=ModelSpec(name="m", path="m"))
    replica = HostedReplica(plan, engine, pull=None)
    replica.start(loop)
    replica.opened("gateway", outbox)
    replica._owners["q", 0] = "gateway"

    class Overtaken(deque):
        """The loop empties the queue just before the second word is put in."""

        def append(self, output) -> None:
            loop.run()
            super().append(output)

    replica._said = Overtaken()
    for index in range(2):
        engine.say(StepOutput(tokens=(Token(request_id="q", attempt=0, index=index, token_id=7),)))
    loop.run()
    assert [token.index for message in outbox.sent if isinstance(message, Tokens) for token in message.tokens] == [0, 1]
