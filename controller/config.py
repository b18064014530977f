"""cluster.yaml: read, checked against what is possible, and expanded into named replicas on nodes.

A bad file is refused whole, before anything starts, by one InvalidConfig that names the value, the bound and the place.
"""

from __future__ import annotations

import contextlib
import difflib
import ipaddress
import itertools
import json
import math
import os
import re
import socket
import ssl
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import psutil
import yaml

from cluster.errors import InvalidConfig, InvalidModel
from cluster.fleet import Fleet, GatewaySpec, ModelSpec, NodeSpec, Pace, ReplicaGroup
from cluster.kv import DTYPE_BYTES, KvLayout
from cluster.placement import ReplicaPlan, WorkerPlan
from policies.import_path import make_policy
from policies.policy import Router
from workers.checkpoint import check_dtype, check_files

MAX_CONFIG_BYTES = 2**20  # Ten thousand nodes by name are half of it.
MAX_REPLICAS = 10_000  # The largest fleet whose decisions are budgeted.
MAX_NAME_CHARS = 40  # Names become directory, actor and metric names; a Unix socket's path has 107 characters.
MAX_MODEL_CHARS = 200  # Hub names are up to 96; clients name a model in every request.
MAX_PORT = 65_535
MAX_THREADS = 1024  # Cores of the largest machines.
TLS_FILES = ("ca.pem", "cert.pem", "key.pem")
MEMORY_SHARE = 0.8  # Of the memory there is for weights and KV: activations and the rest of the machine need the remainder.

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def load_fleet(path: Path) -> Fleet:
    """The fleet of a cluster.yaml, decoded. Relative paths in it are taken from the file's own directory."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidConfig(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise InvalidConfig(f"{path}: {len(data)} bytes above {MAX_CONFIG_BYTES}, the largest config")
    with _named(path):
        return parse_fleet(data, path.absolute().parent)


def check_fleet(path: Path, fleet: Fleet, *, here: bool = True) -> None:
    """Raise InvalidConfig for the first thing in a cluster.yaml that cannot be. `here`: all of it will run on this machine."""
    with _named(path):
        check(fleet)
        if here:
            _check_memory(fleet)
            _check_devices(fleet)
            if fleet.gateway.request_log:
                _check_writable(Path(fleet.gateway.request_log), "gateway.request_log")
            _check_port_free(fleet.gateway.host, fleet.gateway.port)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except InvalidConfig as error:
        raise InvalidConfig(f"{path}: {error}") from error.__cause__


def parse_fleet(data: bytes, base: Path) -> Fleet:
    """Decode YAML into types, without asking whether the fleet is possible. `base`: what relative paths start from."""
    try:
        plain = yaml.load(data, _UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidConfig(f"is no YAML: {_one_line(error)}") from error
    if not isinstance(plain, dict):
        raise InvalidConfig(f"holds {type(plain).__name__}, not a mapping of settings")
    _check_keys(plain, Fleet, "")
    try:
        fleet = msgspec.convert(plain, Fleet)
    except msgspec.ValidationError as error:
        raise InvalidConfig(_one_line(error).replace("$.", "")) from error
    return _with_absolute_paths(fleet, base)


def check(fleet: Fleet) -> None:
    """Raise InvalidConfig for the first thing that cannot be on any machine."""
    _check_names(fleet)
    for index, group in enumerate(fleet.replicas):
        _check_group(fleet, group, f"replicas[{index}]")
    _check_roles(fleet)
    _check_gateway(fleet.gateway)
    _check_transport(fleet)
    make_policy(fleet.routing.use, fleet.routing.settings, place="routing", kind=Router)
    _check_slo(fleet)
    for model in fleet.models:
        _check_model(fleet, model)


class _UniqueKeys(yaml.CSafeLoader):
    """Plain YAML in which a key given twice is an error, not silently its last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        for key, times in keys.items():
            if times > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key}` is given {times} times", node.start_mark)
        return super().construct_mapping(node, deep)


def expand(fleet: Fleet) -> tuple[WorkerPlan, ...]:
    """Named workers with named replicas, on the nodes of each group's pool in turn. Equal fleets expand equally."""
    turns = {pool: itertools.cycle(_nodes_of(fleet, pool)) for pool in {group.pool for group in fleet.replicas}}
    named: Counter[str] = Counter()
    plans = []
    for group in fleet.replicas:
        model = model_of(fleet, group)
        for hosted in _split(group.count, group.per_worker):
            node = next(turns[group.pool])
            accelerator = group.pace.accelerator if group.pace else node.accelerator
            stem = f"{group.role.value}-{accelerator}"
            replicas = []
            for _ in range(hosted):
                replicas.append(ReplicaPlan(replica_id=f"{stem}-{named[stem]}", group=group, model=model))
                named[stem] += 1
            plans.append(WorkerPlan(worker_id=f"worker-{len(plans)}", node=node, replicas=tuple(replicas)))
    return tuple(plans)


def model_of(fleet: Fleet, group: ReplicaGroup) -> ModelSpec:
    """The model that a group serves: the one it names, or the only one."""
    return next(model for model in fleet.models if model.name == (group.model or fleet.models[0].name))


def _split(count: int, per_worker: int) -> Iterator[int]:
    for start in range(0, count, per_worker):
        yield min(per_worker, count - start)


def _nodes_of(fleet: Fleet, pool: str) -> tuple[NodeSpec, ...]:
    return tuple(node for node in fleet.nodes if node.pool == pool)


# Names and keys


def _check_keys(plain: object, kind: object, place: str) -> None:
    """Refuse keys that no type knows, deepest names included: msgspec would name the key but neither its place nor its like."""
    if typing.get_origin(kind) is tuple and isinstance(plain, list):
        for index, item in enumerate(plain):
            _check_keys(item, typing.get_args(kind)[0], f"{place}[{index}]")
    elif typing.get_origin(kind) is dict and isinstance(plain, dict):
        for key, value in plain.items():
            _check_keys(value, typing.get_args(kind)[1], f"{place}.{key}")
    elif typing.get_origin(kind) in (types.UnionType, typing.Union):
        for choice in typing.get_args(kind):
            _check_keys(plain, choice, place)
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(plain, dict):
        hints = typing.get_type_hints(kind)
        for key, value in plain.items():
            where = f"{place}.{key}" if place else str(key)
            if key not in hints:
                raise InvalidConfig(f"unknown key `{where}`{_did_you_mean(str(key), hints)}")
            _check_keys(value, hints[key], where)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=3)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; known here: {', '.join(names)}" if names else ""


def _check_names(fleet: Fleet) -> None:
    _check_name(fleet.name, "name")
    for field, items in (("models", fleet.models), ("nodes", fleet.nodes), ("replicas", fleet.replicas)):
        if not items:
            raise InvalidConfig(f"{field} is empty; at least 1 is needed")
    for field, names in (("models", [m.name for m in fleet.models]), ("nodes", [n.name for n in fleet.nodes])):
        for index, name in enumerate(names):
            if field == "nodes":
                _check_name(name, f"nodes[{index}].name")
            elif not name.isprintable() or " " in name or not 0 < len(name) <= MAX_MODEL_CHARS:
                raise InvalidConfig(f"models[{index}].name {name!r} is not 1 to {MAX_MODEL_CHARS} characters without spaces")
            if name in names[:index]:
                raise InvalidConfig(f"{field}[{index}].name {name} is taken by {field}[{names.index(name)}]; names are given once")
    for index, node in enumerate(fleet.nodes):
        _check_name(node.pool, f"nodes[{index}].pool")
        _check_at_least(node.cpus, 0.1, f"nodes[{index}].cpus")
        _check_known("accelerator", node.accelerator, f"nodes[{index}].accelerator")


def _check_name(name: str, place: str) -> None:
    if len(name) > MAX_NAME_CHARS:
        raise InvalidConfig(f"{place} has {len(name)} characters, above {MAX_NAME_CHARS}")
    if not _NAME.fullmatch(name):
        raise InvalidConfig(f"{place} {name!r} is not made of letters, digits, `.`, `_` and `-`")


def _check_known(catalogue: str, name: str, place: str) -> None:
    from cluster.hardware import ACCELERATORS
    from cluster.models import MODELS

    known = ACCELERATORS if catalogue == "accelerator" else MODELS
    if name not in known:
        raise InvalidConfig(f"{place} {name} is no known {catalogue}{_did_you_mean(name, known)}")


def _check_at_least(value: float, low: float, place: str) -> None:
    if not value >= low:
        raise InvalidConfig(f"{place} {value} is below {low}")
    _check_at_most(value, sys.float_info.max, place)


def _check_at_most(value: float, high: float, place: str) -> None:
    if value > high:
        raise InvalidConfig(f"{place} {value} is above {high}")


def _check_positive(value: float, place: str) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise InvalidConfig(f"{place} {value} is not a finite number above 0")


# Replica groups


def _check_group(fleet: Fleet, group: ReplicaGroup, place: str) -> None:
    for field in ("count", "per_worker", "kv_blocks", "block_tokens", "max_running", "step_budget_tokens", "threads"):
        _check_at_least(getattr(group, field), 1, f"{place}.{field}")
    _check_at_most(group.threads, MAX_THREADS, f"{place}.threads")
    _check_at_most(sum(other.count for other in fleet.replicas), MAX_REPLICAS, "replicas: the sum of all counts")
    models = [model.name for model in fleet.models]
    if not group.model and len(models) > 1:
        raise InvalidConfig(f"{place}.model is left out, but there are {len(models)} models: {', '.join(models)}")
    if group.model and group.model not in models:
        raise InvalidConfig(f"{place}.model {group.model} is no model of this file{_did_you_mean(group.model, models)}")
    if not _nodes_of(fleet, group.pool):
        pools = {node.pool for node in fleet.nodes}
        raise InvalidConfig(f"{place}.pool {group.pool} has no node{_did_you_mean(group.pool, pools)}")
    if group.per_worker > 1 and group.engine != "emulated":
        raise InvalidConfig(f"{place}.per_worker {group.per_worker} above 1: only emulated replicas share a worker process")
    if group.engine == "emulated" and group.pace is None:
        raise InvalidConfig(f"{place}.pace is missing: an emulated engine has no other source of step times")
    if group.engine == "torch":
        with _placed(place):
            check_dtype(group.dtype, group.device)
    if group.step_budget_tokens < group.max_running:
        raise InvalidConfig(
            f"{place}.step_budget_tokens {group.step_budget_tokens} is below {place}.max_running {group.max_running}: "
            "one step could not hold every decoding request"
        )
    if group.pace is not None:
        _check_known("model shape", group.pace.shape, f"{place}.pace.shape")
        _check_known("accelerator", group.pace.accelerator, f"{place}.pace.accelerator")
        _check_at_least(group.pace.tensor_parallel, 1, f"{place}.pace.tensor_parallel")
        _check_positive(group.pace.speedup, f"{place}.pace.speedup")
        _check_pace_fits(group, group.pace, place)


@contextlib.contextmanager
def _placed(place: str) -> Iterator[None]:
    """A field's error with the place of what has the field."""
    try:
        yield
    except InvalidConfig as error:
        raise InvalidConfig(f"{place}.{error}") from error


def _check_pace_fits(group: ReplicaGroup, pace: Pace, place: str) -> None:
    """Whether the machine that is played could hold the model that is played, with this much KV."""
    from cluster.hardware import ACCELERATORS
    from cluster.models import MODELS
    from cluster.performance import roofline

    shape, accelerator = MODELS[pace.shape], ACCELERATORS[pace.accelerator]
    with _placed(f"{place}.pace"):
        roofline(shape, accelerator, pace.tensor_parallel)
    weights, room = shape.weight_bytes(), accelerator.memory_bytes * pace.tensor_parallel
    kv = group.kv_blocks * group.block_tokens * shape.kv_bytes_per_token()
    if weights + kv > room:
        raise InvalidConfig(
            f"{place}: {group.kv_blocks} kv_blocks of {shape.name} are {kv} bytes beside {weights} of weights, "
            f"above {room}, the memory of {pace.tensor_parallel} x {accelerator.name}"
        )


def _check_roles(fleet: Fleet) -> None:
    for model in fleet.models:
        groups = [group for group in fleet.replicas if model_of(fleet, group) is model]
        if not any(group.role.decodes for group in groups):
            raise InvalidConfig(f"replicas: none decodes model {model.name}; give it one of role decode or mixed")
        for field in ("block_tokens", "dtype"):
            values = {getattr(group, field): index for index, group in enumerate(fleet.replicas) if group in groups}
            if len(values) > 1:
                given = " but ".join(f"{value} in replicas[{index}]" for value, index in values.items())
                raise InvalidConfig(f"replicas: {field} is {given}; those of one model hand KV over to each other and must agree")


# Models and memory


def _check_model(fleet: Fleet, model: ModelSpec) -> None:
    """A path that looks like one must be a model directory; other names are left to the hub."""
    path = Path(model.path)
    if path.is_absolute() and any(group.engine == "torch" for group in fleet.replicas if model_of(fleet, group) is model):
        try:
            check_files(path)
        except InvalidModel as error:
            raise InvalidConfig(f"models: {model.name}: {error}") from error


def _check_memory(fleet: Fleet) -> None:
    """Refuse more weights and KV than this machine has memory for: all nodes of a local Ray are this machine."""
    bound = int(psutil.virtual_memory().available * MEMORY_SHARE)
    total = 0
    for index, group in enumerate(fleet.replicas):
        kv, weights = _kv_bytes(model_of(fleet, group), group), _weight_bytes(model_of(fleet, group), group)
        total += group.count * (kv + weights)
        if total > bound:
            raise InvalidConfig(
                f"replicas[{index}]: {group.count} x ({group.kv_blocks} kv_blocks, {kv} bytes, and {weights} of weights) bring the "
                f"fleet to {total} bytes, above {bound}, {MEMORY_SHARE:.0%} of this machine's available memory"
            )


def _check_devices(fleet: Fleet) -> None:
    """Refuse CUDA where this machine has none."""
    for index, group in enumerate(fleet.replicas):
        if group.engine == "torch" and group.device != "cpu":
            import torch  # Takes seconds, which a fleet on CPU need not wait for.

            if not torch.cuda.is_available():
                raise InvalidConfig(f"replicas[{index}].device {group.device}: there is no CUDA device on this machine")


def memory_by_node(fleet: Fleet) -> Counter[str]:
    """Bytes of main memory for weights and KV that each node's replicas will take; more while they load."""
    taken: Counter[str] = Counter()
    for plan in expand(fleet):
        for replica in plan.replicas:
            taken[plan.node.name] += _kv_bytes(replica.model, replica.group) + _weight_bytes(replica.model, replica.group)
    return taken


def _kv_bytes(model: ModelSpec, group: ReplicaGroup) -> int:
    """0 where it is not in main memory, or where only the hub knows the model."""
    path = Path(model.path) / "config.json"
    if group.engine != "torch" or group.device != "cpu" or not path.is_file():
        return 0
    return group.kv_blocks * layout_of(path, group.dtype, group.block_tokens).block_bytes


def _weight_bytes(model: ModelSpec, group: ReplicaGroup) -> int:
    """As in the checkpoint's files."""
    if group.engine != "torch" or group.device != "cpu":
        return 0
    return sum(path.stat().st_size for path in Path(model.path).glob("*.safetensors"))


def layout_of(config: Path, dtype: str, block_tokens: int) -> KvLayout:
    """How a checkpoint's KV lies, from its config.json."""
    try:
        fields = json.loads(config.read_bytes())
        heads = int(fields["num_attention_heads"])
        return KvLayout(
            layers=int(fields["num_hidden_layers"]),
            kv_heads=int(fields.get("num_key_value_heads") or heads),
            head_dim=int(fields.get("head_dim") or int(fields["hidden_size"]) // heads),
            dtype=dtype if dtype in DTYPE_BYTES else "float32",
            block_tokens=block_tokens,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidConfig(f"{config}: names no attention layers, heads and sizes: {error!r}") from error


# Gateway and transport


def _check_gateway(gateway: GatewaySpec) -> None:
    for field in ("replicas", "max_queue", "max_attempts", "max_body_bytes"):
        _check_at_least(getattr(gateway, field), 1, f"gateway.{field}")
    for field in ("queue_timeout_s", "silence_s"):
        _check_at_least(getattr(gateway, field), 0.1, f"gateway.{field}")
    if not 1 <= gateway.port <= MAX_PORT:
        raise InvalidConfig(f"gateway.port {gateway.port} is outside [1, {MAX_PORT}]")
    if gateway.keys_file and gateway.allow_anonymous:
        raise InvalidConfig("gateway.keys_file and gateway.allow_anonymous exclude each other: give one")
    if not gateway.keys_file and not gateway.allow_anonymous:
        raise InvalidConfig("gateway.keys_file is missing; to serve without keys, set gateway.allow_anonymous: true")
    if gateway.keys_file and not Path(gateway.keys_file).is_file():
        raise InvalidConfig(f"gateway.keys_file {gateway.keys_file} is no file")


def _check_writable(directory: Path, place: str) -> None:
    """A directory that is there, or can be made."""
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    if not nearest.is_dir():
        raise InvalidConfig(f"{place} {directory}: {nearest} is no directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InvalidConfig(f"{place} {directory}: {nearest} cannot be written to")


def _check_transport(fleet: Fleet) -> None:
    transport = fleet.transport
    if transport.kv_bytes_per_s is not None:
        _check_positive(transport.kv_bytes_per_s, "transport.kv_bytes_per_s")
    if transport.secret_file is not None:
        _check_secret(Path(transport.secret_file))
    if transport.tls_dir is not None:
        for name in TLS_FILES:
            if not (Path(transport.tls_dir) / name).is_file():
                raise InvalidConfig(f"transport.tls_dir {transport.tls_dir} lacks {name}; it needs {', '.join(TLS_FILES)}")
        _check_certificates(Path(transport.tls_dir))
    elif not _is_loopback(fleet.gateway.host):
        raise InvalidConfig(
            f"gateway.host {fleet.gateway.host} is no loopback address and transport.tls_dir is missing: "
            "without TLS everything stays on 127.0.0.1"
        )


def _check_secret(file: Path) -> None:
    if not file.is_file():
        raise InvalidConfig(f"transport.secret_file {file} is no file")
    try:
        secret = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"transport.secret_file {file} cannot be read: {error}") from error
    if not secret:
        raise InvalidConfig(f"transport.secret_file {file} is empty")


def _check_certificates(directory: Path) -> None:
    context = ssl.create_default_context()
    authority, certificate, key = (directory / name for name in TLS_FILES)
    try:
        context.load_verify_locations(authority)
        context.load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        reason = error.reason if isinstance(error, ssl.SSLError) and error.reason else str(error)
        raise InvalidConfig(f"transport.tls_dir {directory}: {', '.join(TLS_FILES)} do not load: {reason}") from error


def _check_slo(fleet: Fleet) -> None:
    for name, slo in fleet.slo.items():
        for field in slo.__struct_fields__:
            if (bound := getattr(slo, field)) is not None:
                _check_positive(bound, f"slo.{name}.{field}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_port_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InvalidConfig(f"gateway.port {port} on {host} cannot be had: {error.strerror}") from error


# Paths


def _with_absolute_paths(fleet: Fleet, base: Path) -> Fleet:
    """Every path seen from the file's directory. A model's is one when it starts like one or names something there."""
    replace = msgspec.structs.replace

    def absolute(path: str | None) -> str | None:
        return None if path is None else str(base / Path(path).expanduser())

    def model_path(path: str) -> str:
        looks_like_path = path.startswith((".", "/", "~"))
        return str(base / Path(path).expanduser()) if looks_like_path or (base / path).exists() else path

    return replace(
        fleet,
        models=tuple(replace(model, path=model_path(model.path)) for model in fleet.models),
        gateway=replace(
            fleet.gateway, keys_file=absolute(fleet.gateway.keys_file), request_log=absolute(fleet.gateway.request_log)
        ),
        transport=replace(
            fleet.transport, secret_file=absolute(fleet.transport.secret_file), tls_dir=absolute(fleet.transport.tls_dir)
        ),
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
