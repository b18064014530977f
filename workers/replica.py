"""One replica in a worker: an engine, the roles it plays, and whom its tokens and block events go to.

The engine speaks from its own thread. What it says waits in one queue and crosses to the loop in one callback however many
steps it holds, so the queue is no longer than the loop is late; a loop 5 s late has lost its worker's place in the registry.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import defaultdict, deque
from collections.abc import Sequence

import msgspec

from cluster.errors import InvalidRequest
from cluster.fleet import NodeSpec, ReplicaGroup
from cluster.handoff import Token
from cluster.kv import KvEvent
from cluster.placement import ReplicaPlan
from cluster.replica import Load, Phase, Replica, Role
from transports.messages import BlockEvents, Submit, Tokens
from transports.transport import Outbox
from workers.decode import DecodeRole, Pull
from workers.engines.engine import Engine, StepOutput
from workers.prefill import PrefillRole

DRY_POLL_S = 0.05
STALL_S = 30.0  # An engine with work that makes no step for so long hangs: the largest step of a slow machine takes seconds.
MAX_EVENTS_PER_MESSAGE = 1024  # A resync of a large cache goes in pieces well below the largest message.


class HostedReplica:
    """All but `_sink` runs on the loop's thread."""

    def __init__(self, plan: ReplicaPlan, engine: Engine, pull: Pull) -> None:
        self.plan = plan
        self.engine = engine
        self.phase = Phase.STARTING
        self.ready_since_s: float | None = None
        self._pull = pull
        self._outboxes: dict[str, Outbox] = {}
        self._sequences: dict[str, int] = {}
        self._owners: dict[tuple[str, int], str] = {}
        self._said: deque[StepOutput] = deque()
        self._flushing = False
        """A flush is asked for and has not begun."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reports = 0
        self._steps = 0
        self._stepped_s = 0.0
        self._put_on(plan.group.role)

    def _put_on(self, role: Role) -> None:
        self.prefill = PrefillRole(self.engine) if role.prefills_for_others else None
        self.decode = DecodeRole(self.engine, self._pull, self._say) if role.decodes else None

    @property
    def replica_id(self) -> str:
        return self.plan.replica_id

    @property
    def busy(self) -> bool:
        """Whether a request or a pull still needs this replica."""
        return bool(self._owners) or (self.prefill is not None and self.prefill.busy)

    @property
    def pulling(self) -> int:
        """Requests whose KV is on its way here."""
        return self.decode.pulling if self.decode is not None else 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Load the engine. Blocks; any thread. What the engine says from now on goes to `loop`."""
        self._loop = loop
        self.engine.start(self._sink)
        self.phase = Phase.WARMING

    def become_ready(self) -> None:
        self.phase, self.ready_since_s = Phase.READY, time.time()

    async def run_dry(self, bound_s: float) -> None:
        """Returns when nothing needs this replica any more, or at the bound."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(bound_s):
                while self.busy:  # noqa: ASYNC110 - engines' threads end leases, too.
                    await asyncio.sleep(DRY_POLL_S)

    async def take_role(self, group: ReplicaGroup, bound_s: float) -> None:
        """Finish what the old role has, at the bound hand it back to be served elsewhere; then take the new one, weights kept.

        One that is drained meanwhile takes no role any more: what it still has is the drain's.
        """
        self.plan = msgspec.structs.replace(self.plan, group=group)
        self.phase = Phase.WARMING
        await self.run_dry(bound_s)
        if self.phase is Phase.WARMING:  # Else it was told to drain meanwhile.
            self._abandon(f"{self.replica_id} becomes {group.role.value}")
            await asyncio.to_thread(self.engine.warm)
        if self.phase is Phase.WARMING:
            self._flush()  # The old role's last words.
            self._put_on(group.role)
            self.become_ready()

    def _abandon(self, error: str) -> None:
        if self.decode is not None:
            self.decode.abandon(error)
        else:
            self.engine.abandon(error)

    # Gateways

    def opened(self, gateway_id: str, outbox: Outbox) -> None:
        self._outboxes[gateway_id] = outbox
        self._sequences[gateway_id] = 0
        self.resync(gateway_id)

    def closed(self, gateway_id: str) -> None:
        """Abort what this gateway asked for: nobody is left to read it."""
        self._outboxes.pop(gateway_id, None)
        self._sequences.pop(gateway_id, None)
        for request_id, attempt in [key for key, owner in self._owners.items() if owner == gateway_id]:
            self.abort(gateway_id, request_id, attempt)

    def submit(self, gateway_id: str, submit: Submit) -> None:
        key = (submit.request.request_id, submit.attempt)
        if key in self._owners:
            return  # Said twice; once is enough.
        self._owners[key] = gateway_id
        if self.phase is not Phase.READY:
            self._say(refusal(submit, f"{self.replica_id} is {self.phase.value}, not ready", retry=True))
        elif self.decode is None:
            self._say(refusal(submit, f"{self.replica_id} is a prefill replica and does not decode", retry=True))
        elif submit.request.model != self.plan.model.name:
            error = f"model {submit.request.model} is not served by {self.replica_id}, which serves {self.plan.model.name}"
            self._say(refusal(submit, error, retry=True))
        else:
            self._check_and_submit(submit)

    def _check_and_submit(self, submit: Submit) -> None:
        assert self.decode is not None
        try:
            submit.request.sampling.check()
        except InvalidRequest as error:
            self._say(refusal(submit, str(error), retry=False))
        else:
            self.decode.submit(submit)

    def abort(self, gateway_id: str, request_id: str, attempt: int) -> None:
        """Only the gateway that asked may end a request."""
        if self.decode is not None and self._owners.get((request_id, attempt)) == gateway_id:
            self.decode.abort(request_id, attempt)

    def resync(self, gateway_id: str) -> None:
        """Tell one gateway every block that may be shared, after what is still on its way to all."""
        self._flush()
        self._send_events(gateway_id, self.engine.cached_blocks())

    # What the engine says

    def _sink(self, output: StepOutput) -> None:
        """Any thread."""
        self._said.append(output)
        if not self._flushing and self._loop is not None and not self._loop.is_closed():
            self._flushing = True
            self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        self._flushing = False  # Before the queue is emptied: what is said from here on asks for another flush.
        while self._said:
            output = self._said.popleft()
            self._send_tokens(output.tokens)
            if output.kv_events:
                for gateway_id in self._outboxes:
                    self._send_events(gateway_id, output.kv_events)

    def _say(self, token: Token) -> None:
        self._send_tokens((token,))

    def _send_tokens(self, tokens: Sequence[Token]) -> None:
        """One message to each gateway that has a request among them."""
        by_gateway: defaultdict[str, list[Token]] = defaultdict(list)
        for token in tokens:
            key = (token.request_id, token.attempt)
            owner = self._owners.get(key) if token.finish is None else self._owners.pop(key, None)
            if owner is not None:
                by_gateway[owner].append(token)
        for gateway_id, owned in by_gateway.items():
            if gateway_id in self._outboxes:
                self._outboxes[gateway_id].send(Tokens(replica_id=self.replica_id, tokens=tuple(owned)))

    def _send_events(self, gateway_id: str, events: tuple[KvEvent, ...]) -> None:
        for start in range(0, len(events), MAX_EVENTS_PER_MESSAGE):
            sequence = self._sequences[gateway_id]
            self._sequences[gateway_id] = sequence + 1
            part = events[start : start + MAX_EVENTS_PER_MESSAGE]
            self._outboxes[gateway_id].send(BlockEvents(replica_id=self.replica_id, sequence=sequence, events=part))

    # What it says of itself

    def report(self, now_s: float) -> Load:
        load = self.engine.load()
        if load.steps != self._steps or not (load.running or load.waiting):
            self._steps, self._stepped_s = load.steps, now_s
        if self.phase is Phase.READY and (not self.engine.alive or now_s - self._stepped_s > STALL_S):
            self.phase = Phase.LOST
        self._reports += 1
        return Load(
            replica_id=self.replica_id,
            sequence=self._reports,
            at_s=now_s,
            phase=self.phase,
            running=load.running,
            waiting=load.waiting + self.pulling,
            waiting_tokens=load.waiting_tokens,
            kv_tokens=load.kv_tokens,
            kv_blocks_used=load.kv_blocks_used,
            step_s=load.step_s,
            slowdown=load.slowdown,
            power_w=load.power_w,
            overrun_share=load.overrun_steps / load.steps if load.steps else 0.0,
        )

    def row(self, worker_id: str, node: NodeSpec, endpoint: str, metrics_endpoint: str, host_id: str) -> Replica:
        """This replica in the membership table."""
        group, limits = self.plan.group, self.engine.limits
        return Replica(
            replica_id=self.replica_id,
            worker_id=worker_id,
            node=node.name,
            endpoint=endpoint,
            metrics_endpoint=metrics_endpoint,
            pid=os.getpid(),
            role=group.role,
            phase=self.phase,
            model=self.plan.model.name,
            revision=self.plan.model.revision,
            engine=group.engine,
            accelerator=group.pace.accelerator if group.pace else node.accelerator,
            host_id=host_id,
            performance=self.engine.performance,
            layout=self.engine.layout,
            kv_blocks=limits.kv_blocks,
            block_tokens=limits.block_tokens,
            context_tokens=limits.context_tokens,
            max_running=limits.max_running,
            step_budget_tokens=limits.step_budget_tokens,
            ready_since_s=self.ready_since_s,
        )


def refusal(submit: Submit, error: str, *, retry: bool) -> Token:
    """The one token of a request that does not start here."""
    return Token(
        request_id=submit.request.request_id,
        attempt=submit.attempt,
        index=len(submit.generated),
        finish="error",
        error=error,
        retry=retry,
        refused=retry,
    )
