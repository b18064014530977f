"""Whether a checkpoint can be served, before anything is started for it: its files are whole, and its type fits the device."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cluster.errors import InvalidConfig, InvalidModel
from cluster.kv import DTYPE_BYTES

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


def check_dtype(dtype: str, device: str) -> None:
    """Raises InvalidConfig for a type that the engine does not compute in on `device`, cpu or cuda."""
    known = [name for name in DTYPE_BYTES if not name.startswith("float8")]
    if dtype not in known:
        raise InvalidConfig(f"dtype {dtype!r} is none of {', '.join(known)}")
    if device == "cpu" and dtype != "float32":
        raise InvalidConfig(f"dtype {dtype!r} on cpu: only float32 is reliable there")


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
