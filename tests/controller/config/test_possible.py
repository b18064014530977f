"""Claims about cluster.yaml: what is refused, and in which words."""

import contextlib
import re
import socket
from pathlib import Path

import pytest
import torch

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet
from controller.config import check_fleet, load_fleet, memory_by_node
from tests.controller.config.good import GOOD

HTTP_PORT = "control: {{http_port: {}}}\ngateway:"


def read_fleet(path: Path) -> Fleet:
    fleet = load_fleet(path)
    check_fleet(path, fleet)
    return fleet


def test_relative_paths_start_from_the_file(write):
    path = write(GOOD)
    assert read_fleet(path).models[0].path == str(path.parent / "tiny")


# ruff: noqa: E501
REFUSED = {
    "unknown key": ("count: 3", "cuont: 3", "unknown key `replicas[1].cuont`; did you mean count?"),
    "unknown key in a group's pace": ("shape: llama-3.1-8b, accelerator: h100", "shap: x", "`replicas[0].pace.shap`; did you mean shape"),
    "wrong type": ("count: 3", "count: three", "replicas[1].count 'three': Expected `int`, got `str`"),
    "count below one": ("count: 3", "count: 0", "replicas[1].count 0 is below 1"),
    "too many replicas": ("count: 3", "count: 10001", "the sum of all max_replicas 10002 is above 10000"),
    "nobody decodes": ("role: decode", "role: prefill", "none decodes model tiny"),
    "unknown model": ("role: decode,", "role: decode, model: tinny,", "replicas[1].model tinny is no model of this file; did you mean tiny?"),
    "unknown pool": ("role: decode,", "role: decode, pool: gpus,", "replicas[1].pool gpus has no node; known here: default"),
    "emulated without pace": ("role: decode,", "role: mixed}\n  - {role: decode, engine: emulated}\n  - {role: decode,", "replicas[2].pace is missing"),
    "torch replicas in one process": ("role: decode,", "role: decode, per_worker: 2,", "per_worker 2 above 1"),
    "unknown shape": ("shape: llama-3.1-8b, accelerator: h100", "shape: llama-3.1-8, accelerator: h100", "did you mean llama-3.1-8b"),
    "unknown accelerator": ("accelerator: a100-80g}\n", "accelerator: a10O}\n", "nodes[0].accelerator a10O is no known accelerator"),
    "no speed": ("accelerator: h100}}", "accelerator: h100, speedup: 0}}", "replicas[0].pace.speedup 0.0 is not a finite number above 0"),
    "budget below batch": ("role: decode,", "role: decode, step_budget_tokens: 8,", "replicas[1].step_budget_tokens 8 is below max_running 64"),
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
    "a node of a wrong type": ("- {name: b,", "- {name: [b],", "nodes[1].name ['b']: Expected `str`, got `array`"),
    "a long value of a wrong type": ("count: 3", f"count: {'x' * 99}", f"replicas[1].count '{'x' * 59}...: Expected `int`, got `str`"),
    "an SLO of a wrong type": ("gateway:", "slo: {gold: {ttft_s: fast}}\ngateway:", "slo[...].ttft_s: Expected `float | null`, got `str`"),
    "slots beyond any machine": ("{name: a,", "{name: a, slots: 1000000000000000000000000,", "nodes[0].slots 1000000000000000000000000 is above 10000"),
    "model missing": ("path: tiny", "path: ./absent", "absent is no directory"),
    "no router": ("gateway:", "routing: {use: 'policies.policy:Rooter'}\ngateway:", "routing.use 'policies.policy:Rooter' cannot be imported"),
    "unknown setting of the router": ("gateway:", "routing: {settings: {wieght: 1}}\ngateway:", "routing.settings do not fit policies"),
    "more KV than memory": ("count: 3, kv_blocks: 64, pace: {shape: llama-3.1-8b, accelerator: a100-80g}", "count: 3, kv_blocks: 1000000000", "1000000000 kv_blocks, 8192000000000 bytes, and 328 of weights) bring the fleet to"),
    "more KV than the accelerator that is played": ("count: 3, kv_blocks: 64", "count: 3, engine: emulated, kv_blocks: 40000", "above 80000000000, the memory of 1 x a100-80g"),
    "a model above the accelerator that is played": ("shape: llama-3.1-8b, accelerator: h100", "shape: llama-3.1-70b, accelerator: h100", "replicas[0].kv_blocks 64 of llama-3.1-70b are"),
    "block sizes that cannot be handed over": ("count: 3,", "count: 3, block_tokens: 32,", "block_tokens is 16 in replicas[0] but 32 in replicas[1]"),
    "types that cannot be handed over": ("count: 3,", "count: 3, engine: emulated, dtype: bfloat16,", "dtype is float32 in replicas[0] but bfloat16 in replicas[1]"),
    "a type that a CPU does not compute in": ("count: 3,", "count: 3, dtype: bfloat16,", "replicas[1].dtype 'bfloat16' on cpu: only float32 is reliable there"),
    "heads that do not divide": ("accelerator: h100}}", "accelerator: h100, tensor_parallel: 3}}", "replicas[0].pace.tensor_parallel 3 does not divide 32, the heads of llama-3.1-8b"),
    "key given twice": ("gateway:", "name: other\ngateway:", "key `name` is given 2 times"),
    "unknown key in a mapping": ("gateway:", "slo: {gold: {ttft: 1}}\ngateway:", "unknown key `slo.gold.ttft`; did you mean ttft_s"),
    "negative SLO": ("gateway:", "slo: {gold: {ttft_s: -1}}\ngateway:", "slo.gold.ttft_s -1.0 is not a finite number above 0"),
    "endless timeout": ("allow_anonymous: true", "allow_anonymous: true, queue_timeout_s: .inf", "gateway.queue_timeout_s inf is above"),
    "no number of cores": ("{name: a,", "{name: a, cpus: .nan,", "nodes[0].cpus nan is no number"),
    "too many threads": ("count: 3,", "count: 3, threads: 100000,", "replicas[1].threads 100000 is above 1024"),
    "model name with a line break": ("{name: tiny,", '{name: "a\\nb",', "models[0].name 'a\\nb' is not 1 to 200 characters without spaces"),
    "certificates that are none": ("gateway:", "transport: {tls_dir: junk}\ngateway:", "do not load"),
    "a router that is none": ("gateway:", "routing: {use: 'os:getcwd'}\ngateway:", "'os:getcwd' makes str, which is no policies.policy.Router"),
    "a date that is none": ("name: demo", "name: 2020-13-45", "is no YAML: month must be in 1..12"),
    "no YAML": ("models: [", "models: [[", "is no YAML"),
    "too low a count": ("count: 3", "count: -1, min_replicas: 0", "replicas[1].count -1 is below 0"),
    "none at first, though some are always wanted": ("count: 3", "count: 0, max_replicas: 2", "replicas[1].count 0 is below 1; only a group with min_replicas 0 may"),
    "min over max": ("count: 3", "count: 3, min_replicas: 5, max_replicas: 4", "replicas[1].min_replicas 5 is above 4, its max_replicas"),
    "min over the count that stands for max": ("count: 3", "count: 3, min_replicas: 5", "replicas[1].min_replicas 5 is above 3, its count"),
    "more at first than at most": ("count: 3", "count: 3, max_replicas: 2", "replicas[1].count 3 is outside [3, 2]"),
    "fewer at first than at least": ("count: 3", "count: 3, min_replicas: 4, max_replicas: 8", "replicas[1].count 3 is outside [4, 8]"),
    "negative min": ("count: 3", "count: 3, min_replicas: -1", "replicas[1].min_replicas -1 is below 0"),
    "too many replicas at most": ("count: 3", "count: 3, max_replicas: 10000", "the sum of all max_replicas 10001 is above 10000"),
    "nobody may decode": ("count: 3", "count: 0, min_replicas: 0, max_replicas: 0", "none decodes model tiny"),
    "start-up in no time": ("count: 3", "count: 3, startup_s: 0", "replicas[1].startup_s 0.0 is not a finite number above 0"),
    "start-up that never ends": ("count: 3", "count: 3, start_timeout_s: .inf", "replicas[1].start_timeout_s inf is not a finite number above 0"),
    "start-up above its timeout": ("count: 3", "count: 3, startup_s: 20, start_timeout_s: 10", "replicas[1].startup_s 20.0 is above start_timeout_s 10.0"),
    "two pools of one name": ("role: prefill", "role: decode", "replicas[1] is tiny/decode/default, as replicas[0] is: two pools of one name"),
    "no slots": ("{name: a,", "{name: a, slots: 0,", "nodes[0].slots 0 is below 1"),
    "a machine that earns": ("{name: a,", "{name: a, price_usd_per_hour: -1,", "nodes[0].price_usd_per_hour -1.0 is below 0"),
    "a price that is no number": ("{name: a,", "{name: a, price_usd_per_hour: .nan,", "nodes[0].price_usd_per_hour nan is no number"),
    "a price without end": ("{name: a,", "{name: a, price_usd_per_hour: .inf,", "nodes[0].price_usd_per_hour inf is above"),
    "a zone that is no name": ("{name: a,", "{name: a, zone: 'eu west',", "nodes[0].zone 'eu west' is not made of"),
    "a power domain that is no name": ("{name: a,", "{name: a, power_domain: rack/1,", "nodes[0].power_domain 'rack/1' is not made of"),
    "an unknown market": ("{name: a,", "{name: a, market: spott,", "nodes[0].market 'spott' is none of on_demand, spot; did you mean spot?"),
    "an unknown engine": ("count: 3", "count: 3, engine: vllm", "replicas[1].engine 'vllm' is none of torch, emulated"),
    "a TPOT that no machine keeps": ("gateway:", "slo: {gold: {tpot_s: 0.005}}\ngateway:", "slo.gold.tpot_s 0.005 is below 0.0107, the floor of tiny: a decode step of one sequence of llama-3.1-8b on a100-80g"),
    "a TTFT that no machine keeps": ("gateway:", "slo: {gold: {ttft_s: 0.005}}\ngateway:", "slo.gold.ttft_s 0.005 is below 0.00772, the floor of tiny: a prompt of 16 tokens of llama-3.1-8b on h100"),
    "an answer before its first token": ("gateway:", "slo: {gold: {e2e_s: 0.005}}\ngateway:", "slo.gold.e2e_s 0.005 is below 0.00772"),
    "an unknown mode": ("gateway:", "control: {mode: advice}\ngateway:", "control.mode 'advice' is none of act, advise; did you mean advise?"),
    "a policy that is not there": ("gateway:", "control: {pipeline: {policies: [{use: 'policies.scaling:Scalling'}]}}\ngateway:", "control.pipeline.policies[0].use 'policies.scaling:Scalling' cannot be imported"),
    "a module that is not there": ("gateway:", "control: {pipeline: {policies: [{use: 'no.such:Policy'}]}}\ngateway:", "control.pipeline.policies[0].use 'no.such:Policy' cannot be imported"),
    "a guard among the policies": ("gateway:", "control: {pipeline: {policies: [{use: 'policies.guards:Capacity'}]}}\ngateway:", "control.pipeline.policies[0].use 'policies.guards:Capacity' is no msgspec.Struct with a method `decide`"),
    "a policy among the guards": ("gateway:", "control: {pipeline: {guards: [{use: 'policies.scaling:Scaling'}]}}\ngateway:", "control.pipeline.guards[0].use 'policies.scaling:Scaling' is no msgspec.Struct with a method `limit`"),
    "an unknown setting of a policy": ("gateway:", "control: {pipeline: {policies: [{use: 'policies.scaling:Scaling', settings: {windw: {}}}]}}\ngateway:", "unknown key `control.pipeline.policies[0].settings.windw`; did you mean window"),
    "a setting of a wrong type": ("gateway:", "control: {pipeline: {policies: [{use: 'policies.scaling:Scaling', settings: {window: {fall_s: long}}}]}}\ngateway:", "control.pipeline.policies[0].settings.window.fall_s: Expected `float`, got `str`"),
    "a setting out of range": ("gateway:", "control: {pipeline: {policies: [{use: 'policies.scaling:Scaling', settings: {window: {sigmas: .nan}}}]}}\ngateway:", "control.pipeline.policies[0].settings.window: sigmas nan is outside [0.0, inf)"),
    "a look further back than telemetry": ("gateway:", "control: {pipeline: {policies: [{use: 'policies.scaling:Scaling', settings: {window: {fall_s: 900}}}]}}\ngateway:", "control.pipeline.policies[0].settings.window.fall_s 900.0 is above 300.0, the seconds of demand that are kept"),
    "an expansion out of range": ("gateway:", "control: {pipeline: {expansion: {drain_s: -1}}}\ngateway:", "control.pipeline.expansion: drain_s -1.0 is outside [0.0, inf)"),
    "an unknown key in a challenger": ("gateway:", "control: {challengers: {eager: {polices: []}}}\ngateway:", "unknown key `control.challengers.eager.polices`; did you mean policies?"),
    "an unknown setting of a challenger's guard": ("gateway:", "control: {challengers: {eager: {guards: [{use: 'policies.guards:RateOfChange', settings: {up_shar: 1}}]}}}\ngateway:", "unknown key `control.challengers.eager.guards[0].settings.up_shar`; did you mean up_share"),
    "a challenger that is no name": ("gateway:", "control: {challengers: {'so bold': {}}}\ngateway:", "control.challengers: the name 'so bold' is not made of"),
    "a port below 0": ("gateway:", "control: {http_port: -1}\ngateway:", "control.http_port -1 is outside [0, 65535]"),
    "one port for two": ("gateway:", "control: {http_port: PORT}\ngateway:", "is gateway.port, too"),
    "a journal without room": ("gateway:", "control: {journal_bytes: 1000}\ngateway:", "control.journal_bytes 1000 is below 16777216"),
    "a Prometheus that is no URL": ("gateway:", "telemetry: {prometheus_url: 'localhost:9090'}\ngateway:", "telemetry.prometheus_url 'localhost:9090' is no http:// or https:// URL with a host"),
    "a Prometheus without a host": ("gateway:", "telemetry: {prometheus_url: 'http://:9090'}\ngateway:", "telemetry.prometheus_url 'http://:9090' is no http:// or https:// URL with a host"),
    "a Prometheus at no port": ("gateway:", "telemetry: {prometheus_url: 'http://host:port'}\ngateway:", "telemetry.prometheus_url 'http://host:port' is no http:// or https:// URL with a host"),
    "two Prometheus servers": ("gateway:", "telemetry: {prometheus_url: 'http://host:9090', local_prometheus: true}\ngateway:", "telemetry.local_prometheus and telemetry.prometheus_url http://host:9090 exclude each other"),
    "a schedule above its group": ("role: decode", "role: decode, schedules: [{start: 08:00, end: 18:30, min_replicas: 4}]", "replicas[1].schedules[0].min_replicas 4 is outside [3, 3], the group's min_replicas and max_replicas"),
    "a schedule below its group": ("role: decode", "role: decode, schedules: [{start: 08:00, end: 18:30, max_replicas: 2}]", "replicas[1].schedules[0].max_replicas 2 is outside [3, 3], the group's min_replicas and max_replicas"),
    "a schedule at no time": ("role: decode", "role: decode, schedules: [{start: 8h, end: 18:30, max_replicas: 3}]", "start '8h' is no time of day from 00:00 to 23:59"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_the_impossible_is_refused_by_name(write, old, new, words):
    assert old in GOOD
    path = write(GOOD.replace(old, new, 1))
    with pytest.raises(InvalidConfig) as refused:
        read_fleet(path)
    assert words in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_pool_that_cannot_hold_what_it_starts_is_refused(write):
    text = GOOD.replace("{name: a,", "{name: a, slots: 1,").replace("{name: b,", "{name: b, slots: 2,")
    words = "nodes: pool default has 3 slots, below 4, the replicas it starts: 1 of replicas[0] + 3 of replicas[1]"
    with pytest.raises(InvalidConfig, match=re.escape(words)):
        read_fleet(write(text))


def test_an_slo_is_kept_by_the_best_group_of_a_role(write):
    """A single one that cannot does not refuse it."""
    second = "  - {role: mixed, kv_blocks: 64, pace: {shape: llama-3.1-8b, accelerator: b200}}\ngateway:"
    text = GOOD.replace("gateway:", f"{second}").replace("gateway:", "slo: {gold: {tpot_s: 0.005, ttft_s: 0.005}}\ngateway:")
    assert read_fleet(write(text)).slo["gold"].tpot_s == 0.005


def test_an_engine_without_a_pace_has_no_floor(write):
    text = GOOD.replace(", pace: {shape: llama-3.1-8b, accelerator: a100-80g}", "")
    read_fleet(write(text.replace("gateway:", "slo: {gold: {tpot_s: 0.0001, ttft_s: 0.0001}}\ngateway:")))


def test_a_group_may_start_with_none_where_none_is_the_least(write):
    fleet = read_fleet(write(GOOD.replace("role: prefill,", "role: prefill, count: 0, min_replicas: 0, max_replicas: 2,")))
    assert fleet.replicas[0].count == 0


def test_a_local_prometheus_must_be_installed(write, monkeypatch):
    path = write(GOOD.replace("gateway:", "telemetry: {local_prometheus: true}\ngateway:"))
    monkeypatch.setenv("PATH", str(path.parent))
    with pytest.raises(InvalidConfig, match=r"telemetry.local_prometheus true: .* `apt-get install prometheus` brings it"):
        read_fleet(path)
    (path.parent / "prometheus").write_text("")
    (path.parent / "prometheus").chmod(0o755)
    read_fleet(path)


def test_a_local_prometheus_needs_a_local_fleet(write):
    path = write(GOOD.replace("gateway:", "telemetry: {local_prometheus: true}\ngateway:"))
    with pytest.raises(InvalidConfig, match=r"telemetry.local_prometheus true: only a fleet on this machine"):
        check_fleet(path, load_fleet(path), here=False)


@pytest.mark.parametrize(("old", "new", "place"), [("PORT", "{}", "gateway.port"), ("gateway:", HTTP_PORT, "control.http_port")])
def test_a_port_that_is_taken_is_refused_unless_the_fleet_itself_has_it(write, old: str, new: str, place: str):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = write(GOOD.replace(old, new.format(port)))
        with pytest.raises(InvalidConfig, match=f"{place} {port} on 127.0.0.1 cannot be had"):
            read_fleet(path)
        check_fleet(path, load_fleet(path), running=True)


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
    with pytest.raises(InvalidConfig, match=rf"models\[0\].path: .*tiny/{name} is missing"):
        read_fleet(write(GOOD))


EMULATED = "\nreplicas: [{role: mixed, engine: emulated, pace: {shape: llama-3.1-8b, accelerator: h100}}]\ngateway: {port: PORT, allow_anonymous: true}\n"


@pytest.mark.parametrize(
    ("path", "said"), [("/no/such/model", "/no/such/model is no directory"), ("./junk", "tokenizer.json is missing")]
)
def test_a_model_that_only_the_gateway_reads_is_looked_for_too(write, path: str, said: str):
    with pytest.raises(InvalidConfig, match=rf"models\[0\].path: .*{said}"):
        read_fleet(write(f"models: [{{name: tiny, path: {path}}}]\nnodes: [{{name: a, accelerator: h100}}]{EMULATED}"))


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
