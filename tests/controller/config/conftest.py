"""A cluster.yaml beside a tiny model directory."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a cluster.yaml; `PORT` in it becomes a free port."""
    (tmp_path / "tiny").mkdir()
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    (tmp_path / "tiny/config.json").write_text(json.dumps(config))
    (tmp_path / "tiny/tokenizer.json").write_text("{}")
    save_file({"w": np.zeros(64, np.float32)}, tmp_path / "tiny/model.safetensors")

    (tmp_path / "blank").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "junk").mkdir()
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / "junk" / name).write_text("junk")

    def write(text: str) -> Path:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            text = text.replace("PORT", str(probe.getsockname()[1]))
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return path

    return write
