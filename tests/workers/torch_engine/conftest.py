"""Tiny checkpoints, written once, and engines over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.workers.torch_engine.tiny import CONFIGS, Stepped, save_model


@pytest.fixture(scope="session")
def model_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: save_model(config, folder / name) for name, config in CONFIGS.items()}


@pytest.fixture(scope="session")
def llama(model_paths: dict[str, Path]) -> Path:
    return model_paths["llama"]


@pytest.fixture
def stepped(llama: Path) -> Iterator[Callable[..., Stepped]]:
    """Makes engines, by default over the Llama shape; they are stopped at the end."""
    made: list[Stepped] = []

    def make(path: Path = llama, **options: object) -> Stepped:
        made.append(Stepped(path, **options))
        return made[-1]

    yield make
    for each in made:
        each.engine.stop()
