"""Claims about cluster.yaml: what it expands to, and what is refused in which words."""

import json
import socket
from pathlib import Path

import pytest

from cluster.errors import InvalidConfig
from controller.config import expand, read_fleet

GOOD = """
name: demo
models: [{name: tiny, path: tiny}]
nodes:
  - {name: a, accelerator: a100-80g}
  - {name: b, accelerator: h100}
replicas:
  - {role: prefill, kv_blocks: 64, pace: {shape: llama-3.1-8b, accelerator: h100}}
  - {role: decode, count: 3, kv_blocks: 64, pace: {shape: llama-3.1-8b, accelerator: a100-80g}}
gateway: {port: PORT, allow_anonymous: true}
"""


@pytest.fixture
def write(tmp_path: Path):
    """Writes a cluster.yaml beside a tiny model directory; `{port}` in it is a free port."""
    (tmp_path / "tiny").mkdir()
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    (tmp_path / "tiny/config.json").write_text(json.dumps(config))

    def write(text: str) -> Path:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            text = text.replace("PORT", str(probe.getsockname()[1]))
        path = tmp_path / "cluster.yaml"
        path.write_text(text)
        return path

    return write


def test_replicas_are_named_and_placed_on_nodes_in_turn(write):
    plans = expand(read_fleet(write(GOOD)))
    assert [(plan.worker_id, plan.node.name, plan.replicas[0].replica_id) for plan in plans] == [
        ("worker-0", "a", "prefill-h100-0"),
        ("worker-1", "b", "decode-a100-80g-0"),
        ("worker-2", "a", "decode-a100-80g-1"),
        ("worker-3", "b", "decode-a100-80g-2"),
    ]


def test_emulated_replicas_share_workers(write):
    text = GOOD.replace("count: 3,", "count: 5, per_worker: 2, engine: emulated,")
    assert [len(plan.replicas) for plan in expand(read_fleet(write(text)))] == [1, 2, 2, 1]


def test_relative_paths_start_from_the_file(write):
    path = write(GOOD)
    assert read_fleet(path).models[0].path == str(path.parent / "tiny")


# ruff: noqa: E501
REFUSED = {
    "unknown key": ("count: 3", "cuont: 3", "unknown key `replicas[1].cuont`; did you mean count?"),
    "unknown key in a group's pace": ("shape: llama-3.1-8b, accelerator: h100", "shap: x", "`replicas[0].pace.shap`; did you mean shape"),
    "wrong type": ("count: 3", "count: three", "Expected `int`, got `str` - at `replicas[1].count`"),
    "count below one": ("count: 3", "count: 0", "replicas[1].count 0 is below 1"),
    "too many replicas": ("count: 3", "count: 10001", "below 10002"),
    "nobody decodes": ("role: decode", "role: prefill", "none decodes model tiny"),
    "unknown model": ("role: decode,", "role: decode, model: tinny,", "replicas[1].model tinny is no model of this file; did you mean tiny?"),
    "unknown pool": ("role: decode,", "role: decode, pool: gpus,", "replicas[1].pool gpus has no node; known here: default"),
    "emulated without pace": ("role: decode,", "role: mixed}\n  - {role: decode, engine: emulated}\n  - {role: decode,", "replicas[2].pace is missing"),
    "torch replicas in one process": ("role: decode,", "role: decode, per_worker: 2,", "per_worker 2 above 1"),
    "unknown shape": ("shape: llama-3.1-8b, accelerator: h100", "shape: llama-3.1-8, accelerator: h100", "did you mean llama-3.1-8b"),
    "unknown accelerator": ("accelerator: a100-80g}\n", "accelerator: a10O}\n", "nodes[0].accelerator a10O is no known accelerator"),
    "no speed": ("accelerator: h100}}", "accelerator: h100, speedup: 0}}", "replicas[0].pace.speedup 0.0 is not above 0"),
    "budget below batch": ("role: decode,", "role: decode, step_budget_tokens: 8,", "step_budget_tokens 8 is below replicas[1].max_running 64"),
    "two nodes of one name": ("name: b,", "name: a,", "nodes[1].name a is taken by nodes[0]"),
    "bad name": ("name: demo", "name: ../x", "name '../x' is not made of"),
    "port out of range": ("port: PORT", "port: 70000", "gateway.port 70000 is outside [1, 65535]"),
    "neither keys nor anonymous": (", allow_anonymous: true", "", "gateway.keys_file is missing; to serve without keys"),
    "both keys and anonymous": ("allow_anonymous: true", "allow_anonymous: true, keys_file: k", "exclude each other"),
    "keys file missing": ("allow_anonymous: true", "keys_file: no.keys", "no.keys is no file"),
    "not loopback": ("gateway: {", "gateway: {host: 0.0.0.0, ", "gateway.host 0.0.0.0 is no loopback address"),
    "tls incomplete": ("gateway:", "transport: {tls_dir: tiny}\ngateway:", "lacks ca.pem"),
    "secret missing": ("gateway:", "transport: {secret_file: none.txt}\ngateway:", "is no file"),
    "no throughput": ("gateway:", "transport: {kv_bytes_per_s: 0}\ngateway:", "kv_bytes_per_s 0.0 is not above 0"),
    "model missing": ("path: tiny", "path: ./absent", "absent is no directory"),
    "no router": ("gateway:", "routing: {use: 'policies.policy:Rooter'}\ngateway:", "routing.use 'policies.policy:Rooter' cannot be imported"),
    "unknown setting of the router": ("gateway:", "routing: {settings: {wieght: 1}}\ngateway:", "routing.settings do not fit policies"),
    "more KV than memory": ("count: 3, kv_blocks: 64", "count: 3, kv_blocks: 1000000000", "kv_blocks of 8192 bytes bring the fleet's KV to"),
    "no YAML": ("models: [", "models: [[", "is no YAML"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_the_impossible_is_refused_by_name(write, old, new, words):
    assert old in GOOD
    path = write(GOOD.replace(old, new, 1))
    with pytest.raises(InvalidConfig) as refused:
        read_fleet(path)
    assert words in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_port_that_is_taken_is_refused(write):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidConfig, match=f"gateway.port {port} on 127.0.0.1 cannot be had"):
            read_fleet(write(GOOD.replace("PORT", str(port))))


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(InvalidConfig, match=r"absent.yaml: cannot be read: No such file"):
        read_fleet(tmp_path / "absent.yaml")
