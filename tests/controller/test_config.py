"""Claims about cluster.yaml: what it expands to, and what is refused in which words."""

import contextlib
import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet
from controller.config import check_fleet, expand, load_fleet, memory_by_node

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


def read_fleet(path: Path) -> Fleet:
    fleet = load_fleet(path)
    check_fleet(path, fleet)
    return fleet


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
    "too many replicas": ("count: 3", "count: 10001", "the sum of all counts 10002 is above 10000"),
    "nobody decodes": ("role: decode", "role: prefill", "none decodes model tiny"),
    "unknown model": ("role: decode,", "role: decode, model: tinny,", "replicas[1].model tinny is no model of this file; did you mean tiny?"),
    "unknown pool": ("role: decode,", "role: decode, pool: gpus,", "replicas[1].pool gpus has no node; known here: default"),
    "emulated without pace": ("role: decode,", "role: mixed}\n  - {role: decode, engine: emulated}\n  - {role: decode,", "replicas[2].pace is missing"),
    "torch replicas in one process": ("role: decode,", "role: decode, per_worker: 2,", "per_worker 2 above 1"),
    "unknown shape": ("shape: llama-3.1-8b, accelerator: h100", "shape: llama-3.1-8, accelerator: h100", "did you mean llama-3.1-8b"),
    "unknown accelerator": ("accelerator: a100-80g}\n", "accelerator: a10O}\n", "nodes[0].accelerator a10O is no known accelerator"),
    "no speed": ("accelerator: h100}}", "accelerator: h100, speedup: 0}}", "replicas[0].pace.speedup 0.0 is not a finite number above 0"),
    "budget below batch": ("role: decode,", "role: decode, step_budget_tokens: 8,", "step_budget_tokens 8 is below replicas[1].max_running 64"),
    "two nodes of one name": ("name: b,", "name: a,", "nodes[1].name a is taken by nodes[0]"),
    "bad name": ("name: demo", "name: ../x", "name '../x' is not made of"),
    "port out of range": ("port: PORT", "port: 70000", "gateway.port 70000 is outside [1, 65535]"),
    "neither keys nor anonymous": (", allow_anonymous: true", "", "gateway.keys_file is missing; to serve without keys"),
    "both keys and anonymous": ("allow_anonymous: true", "allow_anonymous: true, keys_file: k", "exclude each other"),
    "keys file missing": ("allow_anonymous: true", "keys_file: no.keys", "no.keys is no file"),
    "not loopback": ("gateway: {", "gateway: {host: 0.0.0.0, ", "gateway.host 0.0.0.0 is no loopback address"),
    "tls incomplete": ("gateway:", "transport: {tls_dir: tiny}\ngateway:", "lacks ca.pem"),
    "empty secret": ("gateway:", "transport: {secret_file: blank}\ngateway:", "/blank is empty"),
    "a secret that is no text": ("gateway:", "transport: {secret_file: binary}\ngateway:", "/binary cannot be read: 'utf-8' codec"),
    "secret missing": ("gateway:", "transport: {secret_file: none.txt}\ngateway:", "is no file"),
    "no throughput": ("gateway:", "transport: {kv_bytes_per_s: 0}\ngateway:", "kv_bytes_per_s 0.0 is not a finite number above 0"),
    "model missing": ("path: tiny", "path: ./absent", "absent is no directory"),
    "no router": ("gateway:", "routing: {use: 'policies.policy:Rooter'}\ngateway:", "routing.use 'policies.policy:Rooter' cannot be imported"),
    "unknown setting of the router": ("gateway:", "routing: {settings: {wieght: 1}}\ngateway:", "routing.settings do not fit policies"),
    "more KV than memory": ("count: 3, kv_blocks: 64, pace: {shape: llama-3.1-8b, accelerator: a100-80g}", "count: 3, kv_blocks: 1000000000", "1000000000 kv_blocks, 8192000000000 bytes, and 328 of weights) bring the fleet to"),
    "more KV than the accelerator that is played": ("count: 3, kv_blocks: 64", "count: 3, engine: emulated, kv_blocks: 40000", "above 80000000000, the memory of 1 x a100-80g"),
    "a model above the accelerator that is played": ("shape: llama-3.1-8b, accelerator: h100", "shape: llama-3.1-70b, accelerator: h100", "replicas[0]: 64 kv_blocks of llama-3.1-70b are"),
    "block sizes that cannot be handed over": ("count: 3,", "count: 3, block_tokens: 32,", "block_tokens is 16 in replicas[0] but 32 in replicas[1]"),
    "types that cannot be handed over": ("count: 3,", "count: 3, engine: emulated, dtype: bfloat16,", "dtype is float32 in replicas[0] but bfloat16 in replicas[1]"),
    "a type that a CPU does not compute in": ("count: 3,", "count: 3, dtype: bfloat16,", "replicas[1].dtype 'bfloat16' on cpu: only float32 is reliable there"),
    "heads that do not divide": ("accelerator: h100}}", "accelerator: h100, tensor_parallel: 3}}", "replicas[0].pace.tensor_parallel 3 does not divide 32, the heads of llama-3.1-8b"),
    "key given twice": ("gateway:", "name: other\ngateway:", "key `name` is given 2 times"),
    "unknown key in a mapping": ("gateway:", "slo: {gold: {ttft: 1}}\ngateway:", "unknown key `slo.gold.ttft`; did you mean ttft_s"),
    "negative SLO": ("gateway:", "slo: {gold: {ttft_s: -1}}\ngateway:", "slo.gold.ttft_s -1.0 is not a finite number above 0"),
    "endless timeout": ("allow_anonymous: true", "allow_anonymous: true, queue_timeout_s: .inf", "gateway.queue_timeout_s inf is above"),
    "no number of cores": ("{name: a,", "{name: a, cpus: .nan,", "nodes[0].cpus nan is below 0.1"),
    "too many threads": ("count: 3,", "count: 3, threads: 100000,", "replicas[1].threads 100000 is above 1024"),
    "model name with a line break": ("{name: tiny,", '{name: "a\\nb",', "models[0].name 'a\\nb' is not 1 to 200 characters without spaces"),
    "certificates that are none": ("gateway:", "transport: {tls_dir: junk}\ngateway:", "do not load"),
    "a router that is none": ("gateway:", "routing: {use: 'os:getcwd'}\ngateway:", "'os:getcwd' makes str, which is no policies.policy.Router"),
    "a date that is none": ("name: demo", "name: 2020-13-45", "is no YAML: month must be in 1..12"),
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


@pytest.mark.parametrize(("cuda", "here", "refused"), [(False, True, True), (False, False, False), (True, True, False)])
def test_cuda_is_refused_where_the_machine_that_runs_it_has_none(write, monkeypatch, cuda: bool, here: bool, refused: bool):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    path = write(GOOD.replace("role: decode,", "role: decode, device: cuda,"))
    expected = pytest.raises(InvalidConfig, match=r"replicas\[1\].device cuda: there is no CUDA device on this machine")
    with expected if refused else contextlib.nullcontext():
        check_fleet(path, load_fleet(path), here=here)


def test_weights_count_towards_the_memory_of_each_node(write):
    path = write(GOOD)
    (path.parent / "tiny/model.safetensors").write_bytes(bytes(1000))
    block = 2 * 2 * 2 * 16 * 16 * 4  # Keys and values x layers x heads x width x tokens x bytes.
    replica = 64 * block + 1000
    assert memory_by_node(load_fleet(path)) == {"a": 2 * replica, "b": 2 * replica}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_checkpoint_that_lacks_a_file_is_refused_before_anything_starts(write, tmp_path: Path, name: str):
    (tmp_path / "tiny" / name).unlink()
    with pytest.raises(InvalidConfig, match=f"models: tiny: .*tiny/{name} is missing"):
        read_fleet(write(GOOD))


def test_a_truncated_checkpoint_is_refused_before_anything_starts(write, tmp_path: Path):
    weights = tmp_path / "tiny/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InvalidConfig, match=r"model.safetensors is truncated or broken"):
        read_fleet(write(GOOD))


def test_a_request_log_that_cannot_be_is_refused(write, tmp_path: Path):
    (tmp_path / "file").write_text("")
    path = write(GOOD.replace("allow_anonymous: true", "allow_anonymous: true, request_log: file/log"))
    with pytest.raises(InvalidConfig, match=r"gateway.request_log .*/file/log: .*/file is no directory"):
        read_fleet(path)


def test_a_fleet_for_other_machines_is_not_measured_by_this_one(write):
    pace = ", pace: {shape: llama-3.1-8b, accelerator: a100-80g}"
    path = write(GOOD.replace(f"kv_blocks: 64{pace}", "kv_blocks: 1000000000"))
    check_fleet(path, load_fleet(path), here=False)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(InvalidConfig, match=r"absent.yaml: cannot be read: No such file"):
        read_fleet(tmp_path / "absent.yaml")
