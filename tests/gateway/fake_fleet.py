"""A scripted fleet behind the transport protocol: its tokens are a function of prompt, seed and position, nothing else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from cluster.errors import Unreachable
from cluster.handoff import Token, TopLogprob
from cluster.performance import PerformanceModel
from cluster.replica import Load, Membership, Phase, Replica, Role
from transports.messages import Abort, FromWorker, Report, Resync, Submit, Tokens, ToWorker

MODEL = "tiny"
LETTERS = "abcdefghijklmnopqrstuvwxyz .,é"
CONTEXT_TOKENS = 256
REPORT_S = 0.02


def drawn(prompt: tuple[int, ...], seed: int, position: int) -> int:
    """The token at a position."""
    return (sum(prompt) * 31 + len(prompt) * 7 + position * position * 13 + position * 5 + seed) % len(LETTERS)


def expected(prompt: tuple[int, ...], seed: int, tokens: int) -> str:
    return "".join(LETTERS[drawn(prompt, seed, position)] for position in range(tokens))


def tokenizer() -> Tokenizer:
    """One token a letter, with <eos>."""
    vocabulary = {letter: number for number, letter in enumerate(LETTERS)}
    made = Tokenizer(models.WordLevel({**vocabulary, "<unk>": len(LETTERS), "<eos>": len(LETTERS) + 1}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return made


def ids(text: str) -> tuple[int, ...]:
    return tuple(LETTERS.index(letter) if letter in LETTERS else len(LETTERS) for letter in text)


def replica(name: str, **changes: object) -> Replica:
    facts = {
        "replica_id": name,
        "worker_id": f"worker-{name}",
        "node": "local",
        "endpoint": f"fake:{name}",
        "role": Role.MIXED,
        "phase": Phase.READY,
        "model": MODEL,
        "engine": "fake",
        "performance": PerformanceModel(step_s=0.001, prefill_token_s=1e-5, sequence_s=1e-5, kv_token_s=1e-8),
        "kv_blocks": 1024,
        "context_tokens": CONTEXT_TOKENS,
        "max_running": 64,
        "step_budget_tokens": 512,
        "ready_since_s": 0.0,
    }
    return Replica(**{**facts, **changes})


class FakeWorker:
    """Generates as fast as the loop turns, up to `stop_at` tokens of each attempt where a fault is scripted."""

    def __init__(self, row: Replica) -> None:
        self.row = row
        self.submits: list[Submit] = []
        self.aborts: list[Abort] = []
        self.aborted = asyncio.Event()
        self.submitted = asyncio.Event()
        self.links: list[FakeLink] = []
        self.fault: Callable[[FakeWorker, Submit, int], bool] = lambda worker, submit, index: False
        """Called before each token; True ends the attempt without a word."""
        self.hold: asyncio.Event | None = None
        """Where set, no token comes before it."""
        self.hung = False
        self.reachable = True
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._sequence = 0

    def say(self, message: FromWorker) -> None:
        if not self.hung:
            for link in self.links:
                link.inbox.put_nowait(message)

    def tokens(self, *tokens: Token) -> None:
        self.say(Tokens(replica_id=self.row.replica_id, tokens=tokens))

    def break_links(self) -> None:
        links, self.links = self.links, []
        for link in links:
            link.broken = True
            link.inbox.put_nowait(None)
        for task in self._tasks.values():
            task.cancel()

    def received(self, message: ToWorker) -> None:
        match message:
            case Submit():
                self.submits.append(message)
                self.submitted.set()
                key = (message.request.request_id, message.attempt)
                self._tasks[key] = asyncio.create_task(self._generate(message))
            case Abort():
                self.aborts.append(message)
                self.aborted.set()
                if task := self._tasks.get((message.request_id, message.attempt)):
                    task.cancel()
            case Resync():
                pass

    def report(self) -> None:
        self._sequence += 1
        load = Load(
            replica_id=self.row.replica_id,
            sequence=self._sequence,
            at_s=time.time(),
            phase=Phase.READY,
            running=sum(not task.done() for task in self._tasks.values()),
            waiting=0,
            waiting_tokens=0,
            kv_tokens=0,
            kv_blocks_used=0,
        )
        self.say(Report(loads=(load,)))

    async def _generate(self, submit: Submit) -> None:
        request, sampling = submit.request, submit.request.sampling
        for index in range(len(submit.generated), sampling.max_tokens):
            await asyncio.sleep(0)
            if self.hold is not None:
                await self.hold.wait()
            if self.fault(self, submit, index):
                return
            self.tokens(self.token(submit, index))
        del self._tasks[request.request_id, submit.attempt]

    def token(self, submit: Submit, index: int) -> Token:
        request, sampling = submit.request, submit.request.sampling
        token_id = drawn(request.prompt, sampling.seed, index)
        letter, first = LETTERS[token_id], index == len(submit.generated)
        tops = tuple(TopLogprob(token_id=n, text=LETTERS[n], logprob=-float(n)) for n in range(sampling.logprobs or 0))
        return Token(
            request_id=request.request_id,
            attempt=submit.attempt,
            index=index,
            token_id=token_id,
            text=letter,
            token_text=letter if sampling.logprobs is not None else "",
            logprob=-0.5 if sampling.logprobs is not None else None,
            top_logprobs=tops,
            finish="length" if index + 1 == sampling.max_tokens else None,
            times=(0.001, 0.002, 0.0) if first else None,
            cached_tokens=3 if first else None,
        )


class FakeLink:
    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker
        self.inbox: asyncio.Queue[FromWorker | None] = asyncio.Queue()
        self.broken = False

    def send(self, message: ToWorker) -> None:
        if self.broken:
            raise Unreachable("broken")
        if not self._worker.hung:
            self._worker.received(message)
        elif isinstance(message, Submit):
            self._worker.submits.append(message)

    async def messages(self) -> AsyncIterator[FromWorker]:
        while (message := await self.inbox.get()) is not None:
            yield message
        raise Unreachable("broken")

    async def close(self) -> None:
        if self in self._worker.links:
            self._worker.links.remove(self)


class FakeFleet:
    """Workers by name, and the transport and membership through which a gateway meets them."""

    def __init__(self, *names: str, **changes: object) -> None:
        self.workers = {name: FakeWorker(replica(name, **changes)) for name in names}
        self._tables: asyncio.Queue[Membership] = asyncio.Queue()
        self._version = 0
        self._reporting: asyncio.Task[None] | None = None

    def publish(self, *rows: Replica) -> None:
        """Tell a new table; without rows, of all workers."""
        self._version += 1
        self._tables.put_nowait(Membership(version=self._version, replicas=rows or tuple(one.row for one in self.workers.values())))

    def empty(self) -> None:
        self._version += 1
        self._tables.put_nowait(Membership(version=self._version))

    async def membership(self) -> AsyncIterator[Membership]:
        while True:
            yield await self._tables.get()

    async def connect(self, endpoint: str, gateway_id: str) -> FakeLink:
        worker = self.workers[endpoint.removeprefix("fake:")]
        if not worker.reachable:
            raise Unreachable(f"{endpoint} does not answer")
        link = FakeLink(worker)
        worker.links.append(link)
        worker.report()
        return link

    async def report_all(self) -> None:
        while True:
            for worker in self.workers.values():
                worker.report()
            await asyncio.sleep(REPORT_S)
