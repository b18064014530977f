"""Whether a checkpoint directory is whole, before anything is started for it: its files are there and as long as they say."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cluster.errors import InvalidModel

CONFIG, INDEX, WEIGHTS, TOKENIZER = "config.json", "model.safetensors.index.json", "model.safetensors", "tokenizer.json"


def check_files(directory: Path) -> None:
    """Raises InvalidModel naming the first file that is missing, truncated or broken. Reads headers only."""
    if not directory.is_dir():
        raise InvalidModel(f"{directory} is no directory")
    for name in (CONFIG, *_weight_files(directory / INDEX), TOKENIZER):
        if not (directory / name).is_file():
            raise InvalidModel(f"{directory / name} is missing")
    for name in _weight_files(directory / INDEX):
        try:
            with safe_open(directory / name, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise InvalidModel(f"{directory / name} is truncated or broken: {error}") from error


def _weight_files(index: Path) -> list[str]:
    if not index.is_file():
        return [WEIGHTS]
    try:
        files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidModel(f"{index} does not parse: {error!r}") from error
    if not files or not all(isinstance(name, str) for name in files):
        raise InvalidModel(f"{index} names no file")
    return files
