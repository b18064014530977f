"""What emulated replicas cost this machine: `python -m benchmarks.emulated [--replicas 300] [--seconds 5] [--json]`.

tokens/s: one engine without pace, 32 streams of 64 tokens after prompts of 128, on one core and without transport.
CPU share, of one core: many replicas paced as Llama-3.1-8B on H100 in one process, idle and then each with a request of
128 prompt and 64 output tokens every `LIGHT_PERIOD_S`, spread evenly; and the share of steps that came a whole step late.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

from cluster.hardware import accelerator
from cluster.models import model_shape
from cluster.performance import PerformanceModel, roofline
from cluster.request import Request, SamplingParams
from workers.engines.emulated import EmulatedEngine
from workers.engines.engine import StepOutput, Submission
from workers.engines.step_driver import Driver, ManualDriver, StepDriver

STREAMS, OUTPUT_TOKENS, PROMPT_TOKENS = 32, 64, 128
ROUNDS = 20
LIGHT_PERIOD_S = 10.0


class Count:
    """A sink that counts tokens."""

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, output: StepOutput) -> None:
        self.tokens += len(output.tokens)


def engine(performance: PerformanceModel, driver: Driver) -> EmulatedEngine:
    return EmulatedEngine(model="m", performance=performance, kv_blocks=4096, context_tokens=8192, vocabulary=32_000, driver=driver)


def submission(name: str, number: int) -> Submission:
    prompt = tuple((number * 31 + place) % 32_000 for place in range(PROMPT_TOKENS))
    sampling = SamplingParams(max_tokens=OUTPUT_TOKENS)
    return Submission(request=Request(request_id=name, model="m", prompt=prompt, sampling=sampling))


def throughput_tokens_s() -> float:
    """The best of a few rounds: what the machine's other work leaves."""
    driver, count = ManualDriver(), Count()
    one = engine(PerformanceModel(step_s=0.0, prefill_token_s=0.0), driver)
    one.start(count)
    best = 0.0
    for number in range(ROUNDS):
        count.tokens, began_s = 0, time.perf_counter()
        for stream in range(STREAMS):
            one.submit(submission(f"{number}-{stream}", number * STREAMS + stream))
        driver.drain()
        best = max(best, count.tokens / (time.perf_counter() - began_s))
    return best


def cpu_shares(replicas: int, seconds: float) -> dict[str, float]:
    driver, count = StepDriver(), Count()
    engines = [engine(roofline(model_shape("llama-3.1-8b"), accelerator("h100")), driver) for _ in range(replicas)]
    for one in engines:
        one.start(count)
        one.submit(submission("first", 0))
    while any(one.load().running + one.load().waiting for one in engines):
        time.sleep(0.05)

    idle = _share(lambda: time.sleep(seconds))
    count.tokens = 0
    light = _share(lambda: _offer(engines, seconds))
    loads = [one.load() for one in engines]
    steps, overruns = sum(load.steps for load in loads), sum(load.overrun_steps for load in loads)
    driver.close()
    return {"idle": idle, "light": light, "light_tokens_s": count.tokens / seconds, "overrun_share": overruns / steps}


def _offer(engines: list[EmulatedEngine], seconds: float) -> None:
    """One request for each replica in turn, at equal gaps."""
    gap_s, began_s = LIGHT_PERIOD_S / len(engines), time.monotonic()
    number = 0
    while number * gap_s < seconds:
        time.sleep(max(began_s + number * gap_s - time.monotonic(), 0.0))
        engines[number % len(engines)].submit(submission(f"light-{number}", number))
        number += 1


def _share(work: Callable[[], None]) -> float:
    began_s, began_cpu_s = time.monotonic(), time.process_time()
    work()
    return (time.process_time() - began_cpu_s) / (time.monotonic() - began_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    shares = cpu_shares(asked.replicas, asked.seconds)
    result = {"tokens_s": throughput_tokens_s(), "replicas": asked.replicas, **shares}
    if asked.json:
        print(json.dumps(result))
        return
    print(f"without pace     {result['tokens_s']:>10,.0f} tokens/s on one core")
    print(f"{asked.replicas} idle replicas {shares['idle']:>10.2%} of a core")
    print(f"{asked.replicas} lightly loaded {shares['light']:>9.2%} of a core at {shares['light_tokens_s']:,.0f} tokens/s")
    print(f"overrun steps    {shares['overrun_share']:>10.2%}")


if __name__ == "__main__":
    main()
