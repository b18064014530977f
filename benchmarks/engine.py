"""The torch engine beside a bare `transformers` loop of the same batch: `python -m benchmarks.engine [--json]`.

Both run the same random 5M-parameter dense model in one process on as many threads; rounds alternate, and each ratio is the
median over rounds, so that whatever else the machine does falls on both. The bare loop keeps a DynamicCache and does nothing but
forward and argmax: no scheduling, no blocks, no text. In the ragged case it pads every sequence on the left to the longest, as
`generate` does. Where `vllm` can be imported (its CPU build), it runs the same cases afterwards.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from benchmarks.random_model import save_random
from cluster.request import Request, SamplingParams
from workers.engines.engine import StepOutput, Submission
from workers.engines.torch_engine.engine import TorchEngine

THREADS = 1
CONTEXT = 256
PROMPT = 512
STEPS = 32
ROUNDS = 5
RAGGED = [64 + (960 * i * i) // 225 for i in range(16)]  # 64 to 1,024 tokens, most of them short, as in chats.
BARS = {"decode_ratio_b1": 0.9, "decode_ratio_b8": 0.9, "decode_ratio_b16": 0.9, "prefill_ratio": 0.9, "ragged_ratio_b16": 1.3}

CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
)


class Runner(Protocol):
    def decode_s(self, contexts: Sequence[int]) -> float:
        """Seconds of STEPS decode steps that end at these contexts."""

    def prefill_s(self) -> float:
        """Seconds to the first token of a prompt of PROMPT tokens."""


class Bare:
    """Forward and argmax."""

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()

    @torch.inference_mode()
    def decode_s(self, contexts: Sequence[int]) -> float:
        # What the cache holds does not matter, so it is noise.
        longest, rows = max(contexts) - STEPS, len(contexts)
        padding = torch.tensor([longest + STEPS - context for context in contexts])
        mask = (torch.arange(longest + STEPS)[None, :] >= padding[:, None]).long() if padding.any() else None
        cache = DynamicCache(config=self.model.config)
        for layer in range(CONFIG.num_hidden_layers):
            cache.update(*torch.randn(2, rows, CONFIG.num_key_value_heads, longest, CONFIG.head_dim), layer)
        ids = _prompts(rows, 1)
        began_s = time.perf_counter()
        for step in range(longest, longest + STEPS):
            logits = self.model(
                input_ids=ids,
                past_key_values=cache,
                attention_mask=None if mask is None else mask[:, : step + 1],
                position_ids=None if mask is None else step - padding[:, None],
                logits_to_keep=1,
            ).logits
            ids = logits.argmax(dim=-1)
            ids.tolist()
        return time.perf_counter() - began_s

    @torch.inference_mode()
    def prefill_s(self) -> float:
        ids = _prompts(1, PROMPT)
        began_s = time.perf_counter()
        cache = DynamicCache(config=self.model.config)
        self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(dim=-1).tolist()
        return time.perf_counter() - began_s


class Engine:
    """Requests in, tokens out, step by step."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.output: StepOutput | None = None
        # A budget that lets all prompts of a case be computed in one step, so that all decode steps have the whole batch.
        self.engine = TorchEngine(
            path=str(path), model="bench", kv_blocks=1024, step_budget_tokens=16384, threads=THREADS, **options
        )
        self.engine.open(self._sink)
        self._salt = 0

    def decode_s(self, contexts: Sequence[int]) -> float:
        for i, context in enumerate(contexts):
            self.submit(f"d{i}", context - STEPS, STEPS + 1)
        assert len(self.step()) == len(contexts)
        began_s = time.perf_counter()
        for _ in range(STEPS):
            tokens = self.step()
        lasted_s = time.perf_counter() - began_s
        assert all(token.finish == "length" for token in tokens)
        return lasted_s

    def prefill_s(self) -> float:
        self.submit("p", PROMPT, 1)
        began_s = time.perf_counter()
        self.step()
        return time.perf_counter() - began_s

    def step(self) -> Sequence:
        self.engine.step()
        assert self.output is not None
        return self.output.tokens

    def submit(self, name: str, prompt: int, max_tokens: int) -> None:
        # A salt of its own keeps each prompt from being found in the prefix cache.
        self._salt += 1
        ids = tuple(_prompts(1, prompt)[0].tolist())
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = Request(request_id=name, model="bench", prompt=ids, sampling=sampling, salt=str(self._salt))
        self.engine.submit(Submission(request=request))

    def _sink(self, output: StepOutput) -> None:
        self.output = output


class Vllm:
    """vLLM's engine in this process, stepped by hand."""

    def __init__(self, path: Path) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        from vllm import LLM

        self._engine = LLM(
            model=str(path),
            dtype="float32",
            skip_tokenizer_init=True,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=CONFIG.max_position_embeddings,
            max_num_batched_tokens=16384,
            distributed_executor_backend="uni",
        ).llm_engine
        torch.set_num_threads(THREADS)
        self._requests = 0

    def decode_s(self, contexts: Sequence[int]) -> float:
        for context in contexts:
            self._submit(context - STEPS, STEPS + 1)
        while sum(bool(output.outputs[0].token_ids) for output in self._engine.step()) < len(contexts):
            pass
        return self._run_s()

    def prefill_s(self) -> float:
        self._submit(PROMPT, 1)
        return self._run_s()

    def _run_s(self) -> float:
        began_s = time.perf_counter()
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return time.perf_counter() - began_s

    def _submit(self, prompt: int, max_tokens: int) -> None:
        from vllm import SamplingParams as Params

        self._requests += 1
        params = Params(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        self._engine.add_request(str(self._requests), {"prompt_token_ids": _prompts(1, prompt)[0].tolist()}, params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        path = save_random(CONFIG, Path(folder))
        bare, engine = Bare(path), Engine(path)
        torch.set_num_threads(THREADS)
        rows = {key: _compare(tokens, measure, bare, engine) for key, (tokens, measure) in CASES.items()}
        vllm_tokens_s = _vllm_tokens_s(path) if importlib.util.find_spec("vllm") is not None else {}
    _print(rows, vllm_tokens_s)
    if arguments.json:
        figures = {key: round(row[2], 3) for key, row in rows.items()}
        speeds = {key.replace("_ratio", "_tokens_per_s"): round(row[1], 1) for key, row in rows.items()}
        beside = {f"vllm_{key.replace('_ratio', '_tokens_per_s')}": round(speed, 1) for key, speed in vllm_tokens_s.items()}
        print(json.dumps(figures | speeds | beside))


def _decoding(contexts: Sequence[int]) -> Callable[[Runner], float]:
    return lambda runner: runner.decode_s(contexts)


# Tokens, and what computes them.
CASES: dict[str, tuple[int, Callable[[Runner], float]]] = {
    **{f"decode_ratio_b{batch}": (batch * STEPS, _decoding([CONTEXT] * batch)) for batch in (1, 8, 16)},
    "prefill_ratio": (PROMPT, lambda runner: runner.prefill_s()),
    "ragged_ratio_b16": (len(RAGGED) * STEPS, _decoding(RAGGED)),
}


def _compare(tokens: int, measure: Callable[[Runner], float], bare: Runner, engine: Runner) -> tuple[float, float, float]:
    """Tokens/s of the bare loop and of the engine, and the median ratio."""
    measure(bare), measure(engine)
    rounds = [(measure(bare), measure(engine)) for _ in range(ROUNDS)]
    bare_s, engine_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    return tokens / bare_s, tokens / engine_s, statistics.median(b / e for b, e in rounds)


def _vllm_tokens_s(path: Path) -> dict[str, float]:
    runner, speeds = Vllm(path), {}
    for key, (tokens, measure) in CASES.items():
        measure(runner)
        speeds[key] = tokens / statistics.median(measure(runner) for _ in range(ROUNDS))
    return speeds


def _print(rows: dict[str, tuple[float, float, float]], vllm_tokens_s: dict[str, float]) -> None:
    table = Table(title=f"torch engine against a bare transformers loop, {THREADS} thread, float32")
    for column in ("", "bare tokens/s", "engine tokens/s", "ratio", "bar", "vLLM tokens/s"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=not column)
    for key, (bare, engine, ratio) in rows.items():
        beside = f"{vllm_tokens_s[key]:,.0f}" if vllm_tokens_s else "not installed"
        table.add_row(key, f"{bare:,.0f}", f"{engine:,.0f}", f"{ratio:.2f}", f"{BARS[key]:.1f}", beside)
    Console().print(table)


def _prompts(rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, 256, (rows, length), generator=generator)


if __name__ == "__main__":
    main()
