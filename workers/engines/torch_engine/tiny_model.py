"""A model with no download: trained here, on a book, in about a minute.

It is large enough to print sentences and sure enough of its next token that float32 noise does not change a greedy output. A model
is cached by the hash of its recipe: this file, the book and the libraries' major versions.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig

from cluster.errors import InvalidConfig

CORPUS = Path(__file__).with_name("alice.txt")
BEGIN, END = "<|begin|>", "<|end|>"
VOCABULARY = 1024
CONTEXT_TOKENS = 4096
PARAGRAPHS_PER_DOCUMENT = 8  # Short enough that the model learns to end.

STEPS = 600
BATCH = 8
SEQUENCE_TOKENS = 96
PEAK_LEARNING_RATE = 5e-3
WARMUP_STEPS = 20
INITIALIZER_RANGE = 0.08  # About one over the root of the width: learns words in half the steps that the usual 0.02 takes.
THREADS = 1  # The matrices are too small for more, and the order of additions is part of the recipe.
SEED = 1865

MARKER = "recipe.json"

# The book has no turns, so a chat is its messages as paragraphs, to be continued.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{{ '\\n\\n' }}{% endfor %}"

Progress = Callable[[int, int, float], None]
"""Called after each step: steps done, steps in all, loss in nats per token."""


def _dense() -> PretrainedConfig:
    return LlamaConfig(**_common())


def _moe() -> PretrainedConfig:
    return Qwen3MoeConfig(
        head_dim=32, moe_intermediate_size=192, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, **_common()
    )


def _common() -> dict[str, object]:
    return {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT_TOKENS,
        "initializer_range": INITIALIZER_RANGE,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
    }


PRESETS: dict[str, Callable[[], PretrainedConfig]] = {"tiny-dense": _dense, "tiny-moe": _moe}


def ensure(preset: str, *, steps: int | None = None, progress: Progress | None = None) -> Path:
    """The cached model's directory, after training it if it is not there.

    steps: fewer than the recipe's train a worse model sooner, for tests.
    Raises InvalidConfig for an unknown preset or a cache that cannot be written.
    """
    steps = steps or STEPS
    recipe = _recipe(preset, steps)
    cached = _cache() / f"{preset}-{recipe['hash']}"
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with _locked(cached.with_suffix(".lock")):
            if not cached.exists():
                with _replacing(cached) as building:
                    _train(preset, steps, progress).save_pretrained(building)
                    _describe(building, recipe)
    except OSError as error:
        raise InvalidConfig(f"model cache {cached.parent} cannot be written: {error.strerror or error}") from error
    return cached


def init(preset: str, directory: Path, *, steps: int | None = None, progress: Progress | None = None) -> None:
    """Write the model to a directory, whole or not at all.

    Raises InvalidConfig for an unknown preset, or a directory that cannot be written or holds anything but such a model.
    """
    recipe = _recipe(preset, steps or STEPS)
    directory = directory.absolute()
    if directory.exists() and not _replaceable(directory):
        raise InvalidConfig(f"{directory} is not empty and holds no model made by `mobula model init`")
    _check_writable(directory)
    if directory.exists() and _made_by(directory) == recipe:
        return
    cached = ensure(preset, steps=steps, progress=progress)
    try:
        with _replacing(directory) as building:
            shutil.copytree(cached, building, dirs_exist_ok=True)
    except OSError as error:
        raise InvalidConfig(f"{directory} cannot be written: {error.strerror or error}") from error


def sample(directory: Path, prompt: str = "Alice", tokens: int = 48) -> str:
    """The model's greedy continuation of a prompt, prompt included."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.tensor([tokenizer.encode(BEGIN + prompt).ids])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=1)
    return tokenizer.decode(output[0].tolist())


def _recipe(preset: str, steps: int) -> dict[str, str | int]:
    if preset not in PRESETS:
        raise InvalidConfig(f"preset {preset!r} is none of {', '.join(PRESETS)}")
    digest = hashlib.sha256(f"{preset} {steps}".encode())
    digest.update(Path(__file__).read_bytes())
    digest.update(CORPUS.read_bytes())
    for library in (torch, transformers, tokenizers):
        digest.update(f"{library.__name__} {library.__version__.split('.')[0]} ".encode())
    return {"preset": preset, "steps": steps, "hash": digest.hexdigest()[:16]}


def _cache() -> Path:
    root = os.environ.get("MOBULA_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "mobula") / "models"


def _replaceable(directory: Path) -> bool:
    return directory.is_dir() and (not any(directory.iterdir()) or _made_by(directory) is not None)


def _made_by(directory: Path) -> dict[str, str | int] | None:
    """The recipe of the model in a directory; None if it is not one of ours."""
    try:
        return json.loads((directory / MARKER).read_text())
    except (OSError, ValueError):
        return None


def _check_writable(directory: Path) -> None:
    """Before a minute is spent on training."""
    parent = next(parent for parent in directory.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InvalidConfig(f"{directory} cannot be written: no permission to create it in {parent}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with its holder."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """An empty directory beside the given one that takes its place at the end, or vanishes on an error."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        building = Path(scratch) / "new"
        building.mkdir()
        yield building
        if directory.exists():
            directory.rename(Path(scratch) / "old")
        building.rename(directory)


def _describe(directory: Path, recipe: dict[str, str | int]) -> None:
    """Write what stands beside the weights."""
    PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(),
        bos_token=BEGIN,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory, save_jinja_files=False)
    (directory / MARKER).write_text(json.dumps(recipe))


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS.read_text().splitlines(keepends=True),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[BEGIN, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def _tokens() -> torch.Tensor:
    """The book as one row of documents, each between begin and end."""
    paragraphs = CORPUS.read_text().strip().split("\n\n")
    documents = [
        BEGIN + "\n\n".join(paragraphs[start : start + PARAGRAPHS_PER_DOCUMENT]) + END
        for start in range(0, len(paragraphs), PARAGRAPHS_PER_DOCUMENT)
    ]
    return torch.tensor(_tokenizer().encode("".join(documents)).ids)


def _train(preset: str, steps: int, progress: Progress | None) -> PreTrainedModel:
    """Next-token prediction with AdamW, a short warm-up and a cosine down to nothing."""
    tokens = _tokens()
    with _seeded_threads():
        chance = torch.Generator().manual_seed(SEED)
        model = transformers.AutoModelForCausalLM.from_config(PRESETS[preset](), attn_implementation="sdpa").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, steps)
            starts = torch.randint(len(tokens) - SEQUENCE_TOKENS, (BATCH,), generator=chance)
            batch = torch.stack([tokens[start : start + SEQUENCE_TOKENS] for start in starts])
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if progress is not None:
                progress(step + 1, steps, loss.item())
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1)
    return model.eval()


def _learning_rate(step: int, steps: int) -> float:
    warmed = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LEARNING_RATE * warmed * 0.5 * (1 + math.cos(math.pi * step / steps))


@contextmanager
def _seeded_threads() -> Iterator[None]:
    """The recipe's seed and number of threads, leaving the caller's as they were."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        torch.set_num_threads(THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
