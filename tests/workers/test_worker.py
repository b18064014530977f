"""Claims about workers with the emulated engine over real gRPC and shared memory, without Ray."""

import asyncio
import urllib.request
from collections.abc import Iterator

import msgspec
import pytest

from cluster.errors import Fenced, InvalidRequest
from cluster.fleet import ModelSpec, NodeSpec, Pace, ReplicaGroup, TransportSpec
from cluster.kv import KvCleared, KvStored
from cluster.placement import ReplicaPlan, WorkerPlan
from cluster.replica import Phase, Replica, Role
from cluster.request import Request, SamplingParams
from transports.grpc import GrpcTransport
from transports.messages import WATCHER, Abort, BlockEvents, PrefillSource, Report, Resync, Submit, Tokens
from transports.transport import Credential, WorkerLink
from workers.worker import Worker, host_id

SECRET = "secret"
PATIENCE_S = 10.0
FAST = Pace(shape="llama-3.1-8b", accelerator="h100", speedup=50.0)
SLOW = Pace(shape="llama-3.1-8b", accelerator="h100", speedup=0.5)


class FakeRegistry:
    def __init__(self) -> None:
        self.rows: dict[str, Replica] = {}
        self.phases: dict[str, Phase] = {}
        self.registered = asyncio.Event()
        self.failures: asyncio.Queue[tuple[str, str, bool]] = asyncio.Queue()
        self.fenced = False
        self.epoch = 1

    async def register(self, replicas):
        if self.fenced:
            raise Fenced("replaced")
        self.registered.set()
        await self.deregister(replicas[0].worker_id)
        self.rows |= {replica.replica_id: replica for replica in replicas}
        self.phases |= {replica.replica_id: replica.phase for replica in replicas}
        return self.epoch

    async def deregister(self, worker_id):
        self.rows = {name: row for name, row in self.rows.items() if row.worker_id != worker_id}

    async def failed(self, replica_id, error, *, permanent):
        self.failures.put_nowait((replica_id, error, permanent))


class Fleet:
    """Workers and one gateway's links to them."""

    def __init__(self) -> None:
        self.registry = FakeRegistry()
        self.workers: dict[str, Worker] = {}
        self.links: list[WorkerLink] = []

    async def worker(self, name: str, *roles: Role, pace: Pace = FAST, kv: str = "auto") -> Worker:
        model = ModelSpec(name="tiny", path="tiny")
        groups = [ReplicaGroup(role=role, engine="emulated", pace=pace, kv_blocks=64, max_running=8) for role in roles]
        replicas = tuple(ReplicaPlan(replica_id=f"{g.role.value}-{name}-{i}", group=g, model=model) for i, g in enumerate(groups))
        plan = WorkerPlan(worker_id=name, node=NodeSpec(name="a"), replicas=replicas)
        worker = self.workers[name] = Worker(plan, TransportSpec(kv=kv), SECRET, self.registry)
        await worker.start()
        return worker

    async def link(self, replica_id: str, gateway: str = "gateway") -> "Link":
        link = await GrpcTransport(Credential(secret=SECRET)).connect(self.registry.rows[replica_id].endpoint, gateway)
        self.links.append(link)
        return Link(link, replica_id)

    def source(self, replica_id: str) -> PrefillSource:
        return PrefillSource(replica_id=replica_id, endpoint=self.registry.rows[replica_id].endpoint, host_id=host_id())

    async def close(self) -> None:
        for link in self.links:
            await link.close()
        for worker in self.workers.values():
            await worker.stop()


class Link:
    def __init__(self, link: WorkerLink, replica_id: str) -> None:
        self._link, self._replica_id = link, replica_id
        self._messages = link.messages()

    def submit(self, request_id="r", *, tokens=8, replica_id=None, model="tiny", prefill=None, prompt=range(100)) -> None:
        request = Request(request_id=request_id, model=model, prompt=tuple(prompt), sampling=SamplingParams(max_tokens=tokens))
        self._link.send(Submit(replica_id=replica_id or self._replica_id, request=request, attempt=0, prefill=prefill))

    def send(self, message) -> None:
        self._link.send(message)

    async def next(self, kind, holds=lambda message: True):
        async with asyncio.timeout(PATIENCE_S):
            async for message in self._messages:
                if isinstance(message, kind) and holds(message):
                    return message
        raise AssertionError("the stream ended")

    async def finished(self, request_id="r"):
        """Every token of a request."""
        tokens = []
        while not tokens or tokens[-1].finish is None:
            tokens += [token for token in (await self.next(Tokens)).tokens if token.request_id == request_id]
        return tokens

    async def idle(self) -> Report:
        return await self.next(Report, lambda m: all(x.running + x.waiting + x.kv_blocks_used == 0 for x in m.loads))

    async def close(self) -> None:
        await self._link.close()


@pytest.fixture
async def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    await fleet.close()


def ids(tokens) -> list[int]:
    assert tokens[-1].finish == "length", tokens[-1]
    assert [token.index for token in tokens] == list(range(len(tokens)))
    return [token.token_id for token in tokens]


async def test_a_started_worker_is_ready_in_the_registry_and_gone_after_stop(fleet):
    worker = await fleet.worker("w", Role.PREFILL, Role.DECODE)
    assert fleet.registry.phases == {"prefill-w-0": Phase.READY, "decode-w-1": Phase.READY}
    assert fleet.registry.rows["decode-w-1"].ready_since_s is not None
    await worker.stop()
    assert fleet.registry.rows == {}


@pytest.mark.parametrize("kv", ["grpc", "auto"])
async def test_disaggregated_tokens_equal_those_of_one_replica(fleet, kv):
    await fleet.worker("p", Role.PREFILL, kv=kv)
    await fleet.worker("d", Role.DECODE, kv=kv)
    await fleet.worker("m", Role.MIXED)
    decode, mixed = await fleet.link("decode-d-0"), await fleet.link("mixed-m-0")
    mixed.submit()
    alone = await mixed.finished()
    decode.submit(prefill=fleet.source("prefill-p-0"))
    apart = await decode.finished()
    assert ids(apart) == ids(alone)
    assert len(apart[0].times) == 3
    assert apart[0].cached_tokens == 0
    metrics = await scrape(fleet.workers["d"])
    assert 'mobula_replica_transfers_total{outcome="complete",replica="decode-d-0",role="decode"} 1.0' in metrics


async def scrape(worker: Worker) -> str:
    url = (await worker.status()).metrics_url
    return await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=PATIENCE_S).read().decode())


@pytest.mark.parametrize(
    ("kv", "host", "shared"), [("auto", "", 0), ("auto", "another", 0), ("auto", host_id(), 1), ("grpc", host_id(), 0)]
)
async def test_memory_is_shared_only_with_a_host_that_is_known_to_be_this_one(fleet, monkeypatch, kv, host, shared):
    await fleet.worker("p", Role.PREFILL, kv=kv)
    worker = await fleet.worker("d", Role.DECODE, kv=kv)
    pulled, pull = [], worker._shared.pull

    async def counted(*arguments):
        pulled.append(arguments)
        return await pull(*arguments)

    monkeypatch.setattr(worker._shared, "pull", counted)
    decode = await fleet.link("decode-d-0")
    decode.submit(prefill=msgspec.structs.replace(fleet.source("prefill-p-0"), host_id=host))
    assert len(ids(await decode.finished())) == 8
    assert len(pulled) == shared


async def test_a_dead_prefill_worker_costs_time_and_no_token(fleet):
    await fleet.worker("p", Role.PREFILL)
    await fleet.worker("d", Role.DECODE)
    source = fleet.source("prefill-p-0")
    link = await fleet.link("decode-d-0")
    link.submit("with", prefill=source)
    alone = ids(await link.finished("with"))
    await fleet.workers["p"].stop()
    link.submit("without", prefill=source)
    assert ids(await link.finished("without")) == alone


@pytest.mark.parametrize(
    ("asked", "words", "retry"),
    [
        ({"replica_id": "decode-x-9"}, "no replica decode-x-9 on w", True),
        ({"replica_id": "prefill-w-0"}, "does not decode", True),
        ({"model": "other"}, "model other is not served by decode-w-1", True),
        ({"tokens": 0}, "max_tokens 0 is outside", False),
        ({"prompt": range(5000)}, "5000", False),
    ],
)
async def test_what_cannot_run_here_ends_in_one_token_that_says_why(fleet, asked, words, retry):
    await fleet.worker("w", Role.PREFILL, Role.DECODE)
    link = await fleet.link("decode-w-1")
    link.submit(**asked)
    (token,) = await link.finished()
    assert (token.finish, token.retry) == ("error", retry)
    assert words in token.error


async def test_an_abort_ends_the_request_and_frees_its_blocks(fleet):
    await fleet.worker("w", Role.MIXED, pace=SLOW)
    link = await fleet.link("mixed-w-0")
    link.submit(tokens=800)
    await link.next(Tokens)
    link.send(Abort(request_id="r", attempt=0))
    assert (await link.finished())[-1].finish == "abort"
    await link.idle()


async def test_a_gateway_that_goes_away_has_its_requests_aborted_and_anothers_run_on(fleet):
    await fleet.worker("w", Role.MIXED)
    leaving, staying = await fleet.link("mixed-w-0", "leaving"), await fleet.link("mixed-w-0", "staying")
    leaving.submit("left", tokens=800)
    staying.submit("kept", tokens=50)
    await leaving.next(Tokens)
    await leaving.close()
    assert len(ids(await staying.finished("kept"))) == 50
    await staying.idle()


async def test_a_gateway_cannot_abort_anothers_request(fleet):
    await fleet.worker("w", Role.MIXED)
    one, other = await fleet.link("mixed-w-0", "one"), await fleet.link("mixed-w-0", "other")
    one.submit(tokens=40)
    other.send(Abort(request_id="r", attempt=0))
    assert len(ids(await one.finished())) == 40


async def test_draining_finishes_what_runs_and_refuses_what_comes(fleet):
    worker = await fleet.worker("w", Role.MIXED, pace=SLOW)
    link = await fleet.link("mixed-w-0")
    link.submit("old", tokens=20)
    await link.next(Tokens)
    draining = asyncio.create_task(worker.drain())
    await link.next(Report, lambda report: report.loads[0].phase is Phase.DRAINING)
    assert fleet.registry.phases["mixed-w-0"] is Phase.DRAINING
    link.submit("new")
    (refused,) = await link.finished("new")
    assert refused.retry
    assert "draining" in refused.error
    assert (await link.next(Tokens, lambda m: m.tokens[-1].finish)).tokens[-1].finish == "length"
    await draining


async def test_stopping_ends_what_runs_with_a_word_to_retry(fleet):
    worker = await fleet.worker("w", Role.MIXED, pace=SLOW)
    link = await fleet.link("mixed-w-0")
    link.submit(tokens=800)
    await link.next(Tokens)
    stopping = asyncio.create_task(worker.stop())
    last = (await link.finished())[-1]
    assert (last.finish, last.retry) == ("error", True)
    await stopping


async def test_metrics_count_a_request_whose_kv_is_on_its_way_as_waiting(fleet):
    await fleet.worker("p", Role.PREFILL, pace=msgspec.structs.replace(SLOW, speedup=1e-3))
    worker = await fleet.worker("d", Role.DECODE)
    link = await fleet.link("decode-d-0")
    link.submit("pulled", prefill=fleet.source("prefill-p-0"))
    await link.next(Report, lambda report: report.loads[0].waiting == 1)
    assert 'mobula_replica_waiting{replica="decode-d-0",role="decode"} 1.0' in await scrape(worker)
    link.send(Abort(request_id="pulled", attempt=0))
    await link.finished("pulled")
    assert 'mobula_replica_waiting{replica="decode-d-0",role="decode"} 0.0' in await scrape(worker)


async def test_one_worker_hosts_300_replicas_each_with_its_id_and_metrics(fleet):
    worker = await fleet.worker("w", *[Role.MIXED] * 300)
    names = [f"mixed-w-{i}" for i in range(300)]
    assert fleet.registry.phases == dict.fromkeys(names, Phase.READY)
    link = await fleet.link(names[0])
    for i, name in enumerate(names):
        link.submit(name, replica_id=name, tokens=1 + i % 4)
    ended = 0
    while ended < 300:
        ended += sum(token.finish is not None for token in (await link.next(Tokens)).tokens)
    metrics = await scrape(worker)
    for i, name in enumerate(names):
        assert f'mobula_replica_output_tokens_total{{replica="{name}",role="mixed"}} {1 + i % 4}.0' in metrics


async def test_metrics_tell_what_a_finished_request_left_to_share(fleet):
    worker = await fleet.worker("m", Role.MIXED)
    link = await fleet.link("mixed-m-0")
    link.submit()
    await link.finished()
    assert 'mobula_replica_kv_blocks_cached{replica="mixed-m-0",role="mixed"} 6.0' in await scrape(worker)


async def test_a_replica_whose_engine_has_ended_is_no_longer_ready(fleet):
    worker = await fleet.worker("w", Role.MIXED, Role.MIXED)
    worker._replicas["mixed-w-0"].engine.stop()
    assert [load.phase for load in (await worker.status()).loads] == [Phase.LOST, Phase.READY]


async def test_block_events_are_numbered_and_a_resync_tells_all_again(fleet):
    await fleet.worker("w", Role.MIXED)
    link = await fleet.link("mixed-w-0")
    first = await link.next(BlockEvents)
    assert (first.sequence, first.events[0]) == (0, KvCleared())
    link.submit()
    await link.next(BlockEvents, lambda m: m.sequence == 1 and any(isinstance(event, KvStored) for event in m.events))
    link.send(Resync(replica_id="mixed-w-0"))
    again = await link.next(BlockEvents, lambda m: m.events[0] == KvCleared())
    assert sum(len(event.hashes) for event in again.events if isinstance(event, KvStored)) >= 100 // 16


async def test_a_worker_registers_again_until_a_controller_watches_it(fleet):
    await fleet.worker("w", Role.MIXED)
    await fleet.registry.deregister("w")
    fleet.registry.registered.clear()
    await asyncio.wait_for(fleet.registry.registered.wait(), PATIENCE_S)
    assert "mixed-w-0" in fleet.registry.rows


async def test_a_watcher_hears_reports_and_no_block_events(fleet):
    await fleet.worker("w", Role.MIXED)
    link, watcher = await fleet.link("mixed-w-0"), await fleet.link("mixed-w-0", f"{WATCHER}1")
    link.submit()
    await link.finished()
    for _ in range(2):
        assert isinstance(await watcher.next(object), Report)
    assert fleet.workers["w"]._watched


async def test_a_watcher_of_an_epoch_that_is_over_does_not_count(fleet):
    fleet.registry.epoch = 5
    worker = await fleet.worker("w", Role.MIXED)
    await fleet.link("mixed-w-0", f"{WATCHER}4")
    assert not worker._watched
    await fleet.link("mixed-w-0", f"{WATCHER}5")
    assert worker._watched


def plan_of(worker: Worker, name: str, role: Role, pace: Pace = FAST) -> ReplicaPlan:
    group = ReplicaGroup(role=role, engine="emulated", pace=pace, kv_blocks=64, max_running=8)
    return ReplicaPlan(replica_id=name, group=group, model=ModelSpec(name="tiny", path="tiny"))


async def eventually(registry: FakeRegistry, holds) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            registry.registered.clear()
            await registry.registered.wait()


async def test_a_replica_that_is_ordered_joins_the_others_and_is_told_to_gateways_that_are_there(fleet):
    worker = await fleet.worker("w", Role.MIXED)
    link = await fleet.link("mixed-w-0")
    worker.host(plan_of(worker, "late", Role.MIXED), epoch=1)
    worker.host(plan_of(worker, "late", Role.MIXED), epoch=1)
    first = await link.next(BlockEvents, lambda message: message.replica_id == "late")
    assert (first.sequence, first.events) == (0, (KvCleared(),))
    await eventually(fleet.registry, lambda: fleet.registry.phases.get("late") is Phase.READY)
    link.submit(replica_id="late")
    assert len(ids(await link.finished())) == 8


async def test_a_drained_replica_finishes_what_it_has_and_is_gone_while_the_others_serve(fleet):
    worker = await fleet.worker("w", Role.MIXED, Role.MIXED, pace=SLOW)
    link = await fleet.link("mixed-w-0")
    link.submit("old", tokens=20)
    await link.next(Tokens)
    worker.drain_replica("mixed-w-0", within_s=PATIENCE_S, epoch=1)
    link.submit("new")
    ended = {}
    while len(ended) < 2:
        for token in (await link.next(Tokens)).tokens:
            if token.finish:
                ended[token.request_id] = token
    assert (ended["new"].finish, ended["new"].retry, ended["old"].finish) == ("error", True, "length")
    await eventually(fleet.registry, lambda: set(fleet.registry.rows) == {"mixed-w-1"})


async def test_a_drain_at_its_deadline_hands_the_rest_back(fleet):
    worker = await fleet.worker("w", Role.MIXED, Role.MIXED, pace=SLOW)
    link = await fleet.link("mixed-w-0")
    link.submit(tokens=800)
    await link.next(Tokens)
    worker.drain_replica("mixed-w-0", within_s=0.0, epoch=1)
    last = (await link.finished())[-1]
    assert (last.finish, last.retry) == ("error", True)


async def test_a_worker_whose_last_replica_is_drained_ends(fleet):
    ended = asyncio.Event()
    worker = await fleet.worker("w", Role.MIXED)
    worker._ended = ended.set
    worker.drain_replica("mixed-w-0", within_s=PATIENCE_S, epoch=1)
    await asyncio.wait_for(ended.wait(), PATIENCE_S)
    assert worker.stopped
    assert fleet.registry.rows == {}


@pytest.mark.parametrize(("before", "after"), [(Role.DECODE, Role.PREFILL), (Role.PREFILL, Role.DECODE)])
async def test_a_replica_changes_its_role_in_place_and_serves_in_the_new_one(fleet, before, after):
    worker = await fleet.worker("w", before)
    await fleet.worker("other", after if before is Role.DECODE else Role.PREFILL)
    name = f"{before.value}-w-0"
    engine = worker._replicas[name].engine
    worker.change_role(name, plan_of(worker, name, after).group, within_s=PATIENCE_S, epoch=1)
    await eventually(fleet.registry, lambda: fleet.registry.rows[name].role is after and fleet.registry.phases[name] is Phase.READY)
    assert worker._replicas[name].engine is engine
    if after is Role.DECODE:
        link = await fleet.link(name)
        link.submit(prefill=fleet.source("prefill-other-0"))
        assert len(ids(await link.finished())) == 8
    assert f'role="{before.value}"' not in await scrape(worker)


async def test_a_change_of_role_at_its_bound_hands_running_requests_back(fleet):
    worker = await fleet.worker("w", Role.DECODE, pace=SLOW)
    link = await fleet.link("decode-w-0")
    link.submit(tokens=800)
    await link.next(Tokens)
    worker.change_role("decode-w-0", plan_of(worker, "decode-w-0", Role.PREFILL).group, within_s=0.0, epoch=1)
    last = (await link.finished())[-1]
    assert (last.finish, last.retry) == ("error", True)
    assert "becomes prefill" in last.error


async def test_a_change_of_role_at_its_bound_hands_requests_back_whose_kv_is_on_its_way(fleet):
    await fleet.worker("p", Role.PREFILL, pace=msgspec.structs.replace(SLOW, speedup=1e-3))
    worker = await fleet.worker("w", Role.DECODE)
    link = await fleet.link("decode-w-0")
    link.submit(prefill=fleet.source("prefill-p-0"))
    await link.next(Report, lambda report: report.loads[0].waiting == 1)
    worker.change_role("decode-w-0", plan_of(worker, "decode-w-0", Role.PREFILL).group, within_s=0.0, epoch=1)
    (last,) = await link.finished()
    assert (last.finish, last.retry) == ("error", True)


async def test_orders_of_an_epoch_that_is_over_are_refused(fleet):
    worker = await fleet.worker("w", Role.DECODE)
    worker.host(plan_of(worker, "decode-w-0", Role.DECODE), epoch=3)
    with pytest.raises(Fenced, match="obeys epoch 3; this order is of epoch 2"):
        worker.drain_replica("decode-w-0", within_s=1.0, epoch=2)
    with pytest.raises(Fenced):
        worker.change_role("decode-w-0", plan_of(worker, "x", Role.PREFILL).group, within_s=1.0, epoch=2)
    with pytest.raises(Fenced):
        worker.host(plan_of(worker, "x", Role.PREFILL), epoch=2)


async def test_a_worker_that_was_given_up_ends_when_it_comes_back(fleet):
    ended = asyncio.Event()
    worker = await fleet.worker("w", Role.MIXED)
    worker._ended = ended.set
    fleet.registry.fenced = True
    await asyncio.wait_for(ended.wait(), PATIENCE_S)


async def test_a_start_that_fails_is_told_and_ends_the_worker_that_has_nothing_else(fleet):
    ended = asyncio.Event()
    plan = WorkerPlan(worker_id="w", node=NodeSpec(name="a"), replicas=())
    worker = fleet.workers["w"] = Worker(plan, TransportSpec(), SECRET, fleet.registry, ended=ended.set)
    await worker.serve()
    group = ReplicaGroup(role=Role.MIXED, engine="torch")
    worker.host(ReplicaPlan(replica_id="r", group=group, model=ModelSpec(name="m", path="/no/such/model")), epoch=1)
    name, error, permanent = await asyncio.wait_for(fleet.registry.failures.get(), PATIENCE_S)
    assert (name, permanent) == ("r", True)
    assert "/no/such/model" in error
    await asyncio.wait_for(ended.wait(), PATIENCE_S)


async def test_a_slowed_replica_takes_longer_and_says_so(fleet):
    worker = await fleet.worker("w", Role.MIXED)
    worker.slow("mixed-w-0", 3.0)
    link = await fleet.link("mixed-w-0")
    link.submit(tokens=64)
    await link.finished()
    performance = worker._replicas["mixed-w-0"].engine.performance
    assert worker._replicas["mixed-w-0"].engine.load().step_s > 2.0 * performance.decode_step_s(1, 100)
    with pytest.raises(InvalidRequest, match="no replica x on w"):
        worker.slow("x", 2.0)
