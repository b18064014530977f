"""Claims about the decode role: one last token per request and no block leaked, whatever the order of events."""

import asyncio
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequest, Overloaded, ProtocolMismatch, Unreachable
from cluster.handoff import RequestState, Token
from cluster.kv import KvLayout
from cluster.request import Request, SamplingParams
from transports.messages import KvChunk, KvDone, PrefillSource, Submit
from workers.decode import DecodeRole

SOURCE = PrefillSource(replica_id="prefill-0", endpoint="127.0.0.1:1")
LAYOUT = KvLayout(layers=1, kv_heads=1, head_dim=4)


class FakeImport:
    cached_tokens = 0

    def __init__(self, engine: "FakeEngine") -> None:
        self.engine, self.open, self.refuses = engine, True, False

    def write(self, layer, first_token, kv):
        assert self.open, "a write after the blocks were given back"
        self.engine.written += kv.shape[1]

    def commit(self, state, attempt):
        assert self.open
        if self.engine.refuses_commit:
            raise ProtocolMismatch("KV of token 3 never came")
        self.open = False
        self.engine.reserved -= 1
        self.engine.say(state.request.request_id, attempt, "committed")
        self.engine.firsts.append(state.first)

    def abort(self):
        if self.open:
            self.open = False
            self.engine.reserved -= 1


class FakeEngine:
    """Ends every request at once, and says by `finish` how it came to be generated."""

    layout = LAYOUT

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.firsts: list[Token] = []
        self.aborted: list[tuple[str, int]] = []
        self.reserved = self.written = 0
        self.full = self.refuses_commit = self.overloaded = False

    def say(self, request_id, attempt, finish):
        self.tokens.append(Token(request_id=request_id, attempt=attempt, index=0, token_id=1, finish=finish))

    def submit(self, submission):
        if self.overloaded:
            raise Overloaded("1024 requests waiting, the bound")
        self.say(submission.request.request_id, submission.attempt, "computed")

    def reserve(self, submission):
        if self.full:
            return None
        self.reserved += 1
        return FakeImport(self)

    def abort(self, request_id, attempt=None):
        self.aborted.append((request_id, attempt))


class FakePull:
    """A pull that ends when told to."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[KvDone] = asyncio.get_running_loop().create_future()
        self.write = None

    async def __call__(self, source, pull, write):
        self.write = partial(write, KvChunk(layer=0, first_token=0, tokens=2), np.zeros((2, 2, 1, 4), np.float32))
        return await self.answer


def submit(prefill: PrefillSource | None = SOURCE) -> Submit:
    request = Request(request_id="r", model="tiny", prompt=(1, 2), sampling=SamplingParams(max_tokens=4))
    return Submit(replica_id="decode-0", request=request, attempt=1, prefill=prefill)


def done() -> KvDone:
    first = Token(request_id="r", attempt=0, index=0, token_id=7)
    state = RequestState(request=submit().request, generated=(7,), first=first)
    return KvDone(state=state, queue_s=0.25, prefill_s=0.5, cached_tokens=1)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def parts():
    engine, pull = FakeEngine(), FakePull()
    return engine, pull, DecodeRole(engine, pull, engine.tokens.append)


def finishes(engine: FakeEngine) -> list[str | None]:
    return [token.finish for token in engine.tokens]


async def test_without_a_source_the_prompt_is_computed_here(parts):
    engine, _, role = parts
    role.submit(submit(prefill=None))
    assert finishes(engine) == ["computed"]


async def test_pulled_kv_is_written_and_committed_and_the_first_token_tells_the_times(parts):
    engine, pull, role = parts
    role.submit(submit())
    await settle()
    assert role.pulling == 1
    pull.write()
    pull.answer.set_result(done())
    await settle()
    assert (finishes(engine), engine.written, role.transfers, role.transfer_bytes) == (["committed"], 2, 1, 64)
    first = engine.firsts[0]
    assert (first.attempt, first.times[:2], first.cached_tokens) == (1, (0.25, 0.5), 1)
    assert role.pulling == engine.reserved == 0


@pytest.mark.parametrize(
    "error", [Unreachable("no sign of life"), Overloaded("full"), ProtocolMismatch("layout"), RuntimeError("bug")]
)
async def test_a_broken_pull_is_recomputed_here(parts, error):
    engine, pull, role = parts
    role.submit(submit())
    await settle()
    pull.answer.set_exception(error)
    await settle()
    assert (finishes(engine), engine.reserved, role.transfers_recomputed) == (["computed"], 0, 1)


async def test_without_room_the_prompt_is_computed_here(parts):
    engine, _, role = parts
    engine.full = True
    role.submit(submit())
    assert finishes(engine) == ["computed"]


async def test_kv_that_does_not_fit_the_request_is_recomputed(parts):
    engine, pull, role = parts
    engine.refuses_commit = True
    role.submit(submit())
    await settle()
    pull.answer.set_result(done())
    await settle()
    assert (finishes(engine), engine.reserved) == (["computed"], 0)


async def test_a_request_at_fault_is_refused_for_good_and_an_engine_at_its_bound_for_now(parts):
    engine, pull, role = parts
    role.submit(submit())
    await settle()
    pull.answer.set_exception(InvalidRequest("prompt too long"))
    await settle()
    engine.overloaded = True
    role.submit(submit(prefill=None))
    assert [(token.finish, token.retry) for token in engine.tokens] == [("error", False), ("error", True)]
    assert engine.reserved == 0


async def test_an_abort_before_the_pull_began_gives_the_blocks_back(parts):
    engine, _, role = parts
    role.submit(submit())
    role.abort("r", 1)
    await settle()
    assert (finishes(engine), engine.reserved, role.pulling) == (["abort"], 0, 0)


EVENTS = st.lists(st.sampled_from(["write", "done", "broken", "fault", "abort", "step"]), max_size=8)


@given(EVENTS, st.booleans())
def test_in_any_order_there_is_one_last_token_and_no_leak(events, refuses_commit):
    async def play() -> None:
        engine, pull = FakeEngine(), FakePull()
        engine.refuses_commit = refuses_commit
        role = DecodeRole(engine, pull, engine.tokens.append)
        role.submit(submit())
        for event in events:
            match event:
                case "write" if pull.write and role.pulling:
                    pull.write()
                case "done" if not pull.answer.done():
                    pull.answer.set_result(done())
                case "broken" if not pull.answer.done():
                    pull.answer.set_exception(Unreachable("gone"))
                case "fault" if not pull.answer.done():
                    pull.answer.set_exception(InvalidRequest("bad"))
                case "abort":
                    role.abort("r", 1)
                case "step":
                    await asyncio.sleep(0)
        if not pull.answer.done():
            role.abort("r", 1)
        await settle()
        assert (len(engine.tokens), engine.reserved, role.pulling) == (1, 0, 0)
        if pull.answer.done() and not pull.answer.cancelled():
            pull.answer.exception()

    asyncio.run(play())
