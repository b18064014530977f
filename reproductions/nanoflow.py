"""NanoFlow (OSDI'25): the most tokens a second that compute allows, on the GPUs of its table, and how far engines stay below.

Per GPU the optimum is Compute / (2 P): every token, of prompt or answer, is multiplied once with each parameter. It is the bound
where compute takes longer than memory: T_mem = MemSize / MemBW of a step that reads all that is in memory, against T_comp =
2 B P / Compute of a batch of B tokens that keeps it full. The bound is arithmetic on data sheets; what our engine reaches is
simulated: Llama-2-70B on 8 A100, step times by roofline, in which operations follow one another as in the engines that NanoFlow
is held against.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator

import numpy as np

from cluster.hardware import accelerator
from cluster.models import model_shape
from cluster.performance import roofline
from cluster.step_table import step_table_of
from reproductions.engine_fleets import Colocated, EngineKind, Job
from reproductions.row import Row
from reproductions.settings import Settings

SYSTEM = "NanoFlow"
MODEL, DEVICES = "llama-2-70b", 8
MEASURED_FLOPS = 280e12
"""Of an A100 in the largest matrix products, as noted of the paper."""
PUBLISHED = 1857.0
"""Tokens per second and GPU."""
REACHED, GAIN = 0.685, 1.91
"""NanoFlow's share of the optimum, and how many times that of the best other engine."""
MEMORY_SHARE = 0.9
PLACES = 2048
BUDGET_TOKENS = 2048
"""NanoFlow's dense batch on this machine."""
TOLERANCE = 0.25
LENGTHS = ((512, 512), (1024, 512), (512, 1024))
"""Prompt and answer: the paper's workloads of constant lengths."""


def rows(settings: Settings) -> Iterator[Row]:
    parameters = model_shape(MODEL).parameters()
    ours = MEASURED_FLOPS / (2 * parameters)
    yield _bound(
        "8 A100, 280 TFLOPS each as measured there", f"{PUBLISHED:g} tok/s", ours, (0.95 * PUBLISHED, 1.05 * PUBLISHED), "5 %", WHY
    )
    with (settings.data_dir / "derived/gpu_specs.csv").open() as lines:
        for row in csv.DictReader(lines):
            told = _memory_over_compute(row)
            yield _bound(
                f"{row['gpu']}, {row['fp16_dense_tflops']} TFLOPS ({row['source'].split(' (')[0]})",
                "not stated in our notes",
                float(row["fp16_dense_tflops"]) * 1e12 / (2 * parameters),
                (0.0, np.inf),
                "none: for comparison",
                told,
            )
    for prompt, output in LENGTHS:
        settings.tell(f"{prompt} and {output} tokens")
        yield _reached(settings, prompt, output)


WHY = (
    "280 TFLOPS over twice the 69.0 billion parameters are 2,030; 1,857 is exactly 260 TFLOPS over twice 70 billion, so the "
    "figures noted of the paper do not belong together."
)


def _bound(where: str, published: str, ours: float, bounds: tuple[float, float], tolerance: str, why: str) -> Row:
    return Row(
        system=SYSTEM,
        claim="optimal throughput per GPU, Compute / 2 P",
        setting=f"Llama-2-70B, {where}",
        published=published,
        ours=ours,
        unit="tok/s",
        label="input",
        depends_on_prefill=False,
        low=bounds[0],
        high=bounds[1],
        tolerance=tolerance,
        why=why,
    )


def _memory_over_compute(row: dict[str, str]) -> str:
    """T_mem / T_comp of `DEVICES` GPUs, their memory full of weights and of sequences of 512 + 512 tokens."""
    if not row["mem_bw_gb_s"]:
        return "Its memory's bandwidth is not known, so it is open whether compute bounds it."
    shape = model_shape(MODEL)
    memory, flops = DEVICES * float(row["mem_gb"]) * 1e9, DEVICES * float(row["fp16_dense_tflops"]) * 1e12
    sequences = (memory - shape.weight_bytes()) / (768 * shape.kv_bytes_per_token())
    if sequences <= 0:
        return f"{DEVICES} of them do not hold the model: the bound is arithmetic only."
    # Of 512 + 512 tokens each sequence has a decoding token in a step, and prompts come in at the rate at which answers end.
    compute_s = 2 * (2 * sequences) * shape.parameters() / flops
    ratio = memory / (DEVICES * float(row["mem_bw_gb_s"]) * 1e9) / compute_s
    return f"T_mem / T_comp {ratio:.2f} for 512 + 512 tokens on {DEVICES}: {'compute' if ratio < 1 else 'memory'} is the bound."


def _reached(settings: Settings, prompt: int, output: int) -> Row:
    shape, device = model_shape(MODEL), accelerator("a100-80g")
    table = step_table_of(roofline(shape, device, DEVICES)).stretched(prefill=settings.prefill_cost, decode=1.0)
    room = MEMORY_SHARE * DEVICES * device.memory_bytes - shape.weight_bytes()
    kind = EngineKind(table=table, kv_tokens=int(room / shape.kv_bytes_per_token()), places=PLACES, budget_tokens=BUDGET_TOKENS)
    count = 3000 if settings.quick else 20_000
    served = Colocated([Job(0.0, prompt, output)] * count, kind).run()
    share = _steady_rate(served.last_s) * (prompt + output) / DEVICES / (MEASURED_FLOPS / (2 * shape.parameters()))
    return Row(
        system=SYSTEM,
        claim="share of the optimum that an engine reaches whose operations follow one another (68.5 % by NanoFlow, 1.91x as much)",
        setting=f"Llama-2-70B, 8 A100 by roofline, {prompt} + {output} tokens, 2,048 tokens a step, saturated",
        published=f"{100 * REACHED / GAIN:.1f} %",
        ours=100 * share,
        unit="%",
        label="predicted",
        depends_on_prefill=True,
        low=100 * REACHED / GAIN * (1 - TOLERANCE),
        high=100 * REACHED / GAIN * (1 + TOLERANCE),
        tolerance=f"{TOLERANCE:.0%}",
        why="The engines of the paper lose time between steps and in kernels of their day; the roofline's shares of compute and "
        "bandwidth are those of kernels alone, and only their adding up stands for operations in a row. NanoFlow itself, which "
        "overlaps them, is not simulated.",
    )


def _steady_rate(last_s: np.ndarray) -> float:
    """Jobs a second between the first and the last quarter: without filling and draining."""
    done_s = np.sort(last_s)
    first, last = len(done_s) // 4, 3 * len(done_s) // 4
    return (last - first) / float(done_s[last] - done_s[first])
