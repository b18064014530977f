"""The engine a replica group asks for. Engines are imported when first wanted: torch takes seconds and half a gigabyte."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import InvalidModel
from cluster.fleet import ModelSpec, Pace, ReplicaGroup
from cluster.hardware import accelerator
from cluster.kv import KvLayout
from cluster.models import model_shape
from cluster.performance import PerformanceModel, roofline
from workers.engines.engine import Engine

if TYPE_CHECKING:
    from workers.engines.step_driver import Driver, StepDriver


def build_engine(group: ReplicaGroup, model: ModelSpec, driver: Driver | None = None) -> Engine:
    """Not started yet. `driver`: of an emulated engine's steps; None is the process's own, in real time.

    Raises InvalidModel or InvalidConfig.
    """
    return _torch_engine(group, model) if group.engine == "torch" else _emulated_engine(group, model, driver or _driver())


def performance_of(pace: Pace) -> PerformanceModel:
    """The machine that a pace names, sped up as it says."""
    model = roofline(model_shape(pace.shape), accelerator(pace.accelerator), pace.tensor_parallel)
    return model.scaled(pace.speedup)


def model_directory(model: ModelSpec) -> Path:
    """Where the checkpoint lies; a hub name is fetched. Raises InvalidModel where it cannot be had."""
    path = Path(model.path)
    if path.is_dir():
        return path
    if path.is_absolute():
        raise InvalidModel(f"model {model.name}: path {path} is no directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.path, revision=model.revision or None))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InvalidModel(
            f"model {model.name}: {model.path!r} is no directory and cannot be had from the hub: {reason}"
        ) from error


def _torch_engine(group: ReplicaGroup, model: ModelSpec) -> Engine:
    from workers.engines.torch_engine.engine import TorchEngine

    return TorchEngine(
        path=str(model_directory(model)),
        model=model.name,
        revision=model.revision,
        kv_blocks=group.kv_blocks,
        block_tokens=group.block_tokens,
        max_running=group.max_running,
        step_budget_tokens=group.step_budget_tokens,
        threads=group.threads,
        device=group.device,
        dtype=group.dtype,
        pace=None if group.pace is None else performance_of(group.pace),
    )


@functools.cache
def _driver() -> StepDriver:
    """One clock and thread for all emulated replicas of a process."""
    from workers.engines.step_driver import StepDriver

    return StepDriver()


def _emulated_engine(group: ReplicaGroup, model: ModelSpec, driver: Driver) -> Engine:
    from workers.engines.emulated import EmulatedEngine

    tokenizer = Path(model.path) / "tokenizer.json"
    assert group.pace is not None, "the config is checked"
    shape = model_shape(group.pace.shape)
    return EmulatedEngine(
        model=model.name,
        performance=performance_of(group.pace),
        kv_blocks=group.kv_blocks,
        block_tokens=group.block_tokens,
        max_running=group.max_running,
        step_budget_tokens=group.step_budget_tokens,
        context_tokens=group.kv_blocks * group.block_tokens,
        vocabulary=shape.vocabulary,
        driver=driver,
        revision=model.revision,
        # Small on purpose: hundreds of replicas share a memory bus that is not theirs to emulate.
        layout=KvLayout(layers=2, kv_heads=1, head_dim=8, block_tokens=group.block_tokens),
        tokenizer_path=str(tokenizer) if tokenizer.is_file() else None,
    )
