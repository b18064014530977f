"""A controlled fleet under hands, reloads and faults: what operators say is done, and what breaks is mended, no token lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import aiohttp
import msgspec
import pytest
import yaml

from cluster.models import MODELS
from cluster.request import Request, SamplingParams
from tests.live.conftest import LiveFleet, eventually, mobula
from workers.build_engine import performance_of
from workers.engines.emulated import EmulatedEngine
from workers.engines.engine import Submission
from workers.engines.step_driver import ManualDriver

pytestmark = pytest.mark.timeout(400)  # The fleet starts inside a fixture.

STREAMS = 500
PROMPTS = 20
TOKENS = 180
SEED = 7
SETTLE_S = 40
PACE = {"shape": "llama-3.1-8b", "accelerator": "h100", "speedup": 0.05}  # About 0.15 s a step: time enough for five faults.
MODEL = "tiny"


@pytest.fixture(scope="module")
def config(model_dir: Path) -> dict:
    group = {"engine": "emulated", "pace": PACE, "pool": "p", "kv_blocks": 8192, "max_running": 256, "step_budget_tokens": 512}
    nodes = [{"name": name, "pool": "p", "accelerator": "h100", "slots": 5, "price_usd_per_hour": 0.8} for name in "abc"]
    return {
        "models": [{"name": MODEL, "path": str(model_dir)}],
        "nodes": nodes,
        "replicas": [
            {**group, "role": "prefill", "min_replicas": 1, "max_replicas": 3},
            {**group, "role": "decode", "count": 4, "min_replicas": 4, "max_replicas": 8},
        ],
        "slo": {"default": {"ttft_s": 30.0, "tpot_s": 1.0}},
        "gateway": {"replicas": 2, "max_queue": 1000},
    }


@pytest.fixture(scope="module")
def fleet(start_fleet: Callable[..., LiveFleet], config: dict) -> LiveFleet:
    return start_fleet("control", config)


def said(fleet: LiveFleet, *arguments: str) -> str:
    done = mobula(*arguments, "--fleet", fleet.name, home=fleet.home)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ready(fleet: LiveFleet, role: str) -> int:
    return len(fleet.replicas(role))


def test_a_pinned_group_has_as_many_replicas_as_it_is_pinned_to(fleet: LiveFleet) -> None:
    said(fleet, "pin", "prefill", "2", "--author", "ada")
    assert [(hold["kind"], hold["author"]) for hold in fleet.status()["holds"]] == [("pin", "ada")]
    eventually(lambda: ready(fleet, "prefill") == 2, "a second prefill replica is ready", SETTLE_S)
    said(fleet, "pin", "prefill", "1")
    eventually(lambda: ready(fleet, "prefill") == 1, "one is left", SETTLE_S)
    said(fleet, "unpin", "prefill")
    assert fleet.status()["holds"] == []


def test_a_drained_node_is_emptied_and_its_replicas_start_elsewhere(fleet: LiveFleet) -> None:
    victim = fleet.replicas("decode")[0]["node"]
    said(fleet, "drain", victim)
    eventually(
        lambda: ready(fleet, "decode") == 4 and all(row["node"] != victim for row in fleet.status()["replicas"]),
        f"four decode replicas, none on {victim}",
        SETTLE_S,
    )
    said(fleet, "uncordon", victim)


def test_a_reload_changes_limits_and_a_bad_one_changes_nothing(fleet: LiveFleet) -> None:
    path = fleet.home / "cluster.yaml"
    good = yaml.safe_load(path.read_text())
    bad = {**good, "models": [{**good["models"][0], "name": "other"}]}
    path.write_text(yaml.safe_dump(bad))
    refused = mobula("config", "reload", "-f", str(path), "--fleet", fleet.name, home=fleet.home)
    assert refused.returncode == 2
    assert "models" in refused.stderr
    good["replicas"][0]["min_replicas"] = 2
    good["replicas"][0]["count"] = 2
    path.write_text(yaml.safe_dump(good))
    assert "min_replicas" in said(fleet, "config", "reload", "-f", str(path))
    eventually(lambda: ready(fleet, "prefill") == 2, "a second prefill replica is ready", SETTLE_S)


def expected_texts(model_dir: Path) -> dict[int, str]:
    """By prompt: what any replica says, however often it is interrupted."""
    driver, texts = ManualDriver(), dict.fromkeys(range(PROMPTS), "")

    def sink(output) -> None:
        for token in output.tokens:
            texts[int(token.request_id)] += token.text

    from cluster.fleet import Pace

    engine = EmulatedEngine(
        model=MODEL,
        performance=performance_of(msgspec.convert(PACE, Pace)),
        kv_blocks=8192,
        context_tokens=8192 * 16,
        vocabulary=MODELS["llama-3.1-8b"].vocabulary,
        driver=driver,
        tokenizer_path=str(model_dir / "tokenizer.json"),
    )
    engine.start(sink)
    for number in texts:
        sampling = SamplingParams(max_tokens=TOKENS, seed=SEED, ignore_eos=True)
        engine.submit(Submission(request=Request(request_id=str(number), model=MODEL, prompt=prompt(number), sampling=sampling)))
    driver.drain()
    return texts


def prompt(number: int) -> tuple[int, ...]:
    return tuple(number + 3 + position % 7 for position in range(40))


class Stream:
    """One client: asks one gateway, and the shared port again if that one dies, as often and as late as the `openai` client does.

    Twice because a listening socket outlives by a moment the streams of a process that is killed, and resets who comes then.
    """

    def __init__(self, fleet: LiveFleet, gateway: str, number: int) -> None:
        self.fleet, self.gateway, self.number = fleet, gateway, number
        self.began = asyncio.Event()
        self.retried = False

    async def text(self, session: aiohttp.ClientSession) -> str:
        url = self.gateway
        for pause_s in (0.5, 1.0):
            try:
                return await self._once(session, url)
            except (aiohttp.ClientError, ConnectionError):
                self.retried, url = True, self.fleet.url
                await asyncio.sleep(pause_s)
        return await self._once(session, url)

    async def _once(self, session: aiohttp.ClientSession, url: str) -> str:
        body = {
            "model": MODEL,
            "prompt": list(prompt(self.number)),
            "max_tokens": TOKENS,
            "seed": SEED,
            "stream": True,
            "ignore_eos": True,
        }
        text, ended = "", False
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    assert "error" not in chunk, chunk
                    text += chunk["choices"][0]["text"]
                    self.began.set()
                ended = ended or line.startswith(b"data: [DONE]")
        if not ended:
            raise ConnectionError("the stream broke off")
        return text


async def faults(fleet: LiveFleet, gateway: str) -> None:
    """One after the other, each once the one before it has been noticed."""

    async def until(holds: Callable[[], bool], what: str) -> None:
        def told() -> bool:
            try:
                return holds()
            except AssertionError:  # `status` waits for a controller that restarts, but not for ever.
                return False

        await asyncio.to_thread(eventually, told, what, SETTLE_S)

    def phase(replica_id: str) -> str:
        return {row["replica_id"]: row["phase"] for row in fleet.status()["replicas"]}[replica_id]

    killed, hung = (row["replica_id"] for row in (await asyncio.to_thread(fleet.replicas, "decode"))[:2])
    for arguments, victim in ((("kill", "worker", killed), killed), (("hang", hung), hung)):
        await asyncio.to_thread(said, fleet, "chaos", *arguments)
        await until(lambda victim=victim: phase(victim) == "lost", f"{victim} is lost")
    node = (await asyncio.to_thread(fleet.replicas, "decode"))[0]["node"]
    await asyncio.to_thread(said, fleet, "chaos", "kill", "node", node)
    await until(lambda: not next(row for row in fleet.status()["nodes"] if row["name"] == node)["alive"], f"{node} is down")
    await asyncio.to_thread(said, fleet, "chaos", "kill", "controller")
    await until(lambda: fleet.status()["epoch"] == 2, "another controller has taken over")
    await asyncio.to_thread(said, fleet, "chaos", "kill", "gateway", gateway)


async def test_five_hundred_streams_survive_workers_a_node_the_controller_and_a_gateway(fleet: LiveFleet, model_dir: Path) -> None:
    expected = expected_texts(model_dir)
    lives, dies = fleet.status()["gateways"]
    streams = [Stream(fleet, (lives, dies)[number % 2], number % PROMPTS) for number in range(STREAMS)]
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        answers = [asyncio.create_task(stream.text(session)) for stream in streams]
        for stream in streams:
            await asyncio.wait_for(stream.began.wait(), 60)
        await faults(fleet, dies)
        texts = await asyncio.gather(*answers)
    assert [stream.number for stream, text in zip(streams, texts, strict=True) if text != expected[stream.number]] == []
    assert not any(stream.retried for stream in streams if stream.gateway == lives)


def test_the_fleet_has_what_it_wants_again_and_its_journal_says_why(fleet: LiveFleet) -> None:
    def whole() -> bool:
        return all(group["ready"] == group["wanted"] for group in fleet.status()["groups"])

    eventually(whole, "every group has as many replicas as are wanted", SETTLE_S)
    answer = json.loads(said(fleet, "explain", "decode", "--json"))
    assert answer["groups"]
    assert "agree, 0 differ" in said(fleet, "journal", "replay")
