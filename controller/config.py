"""cluster.yaml: read, checked against what is possible, and expanded into named replicas on nodes.

A bad file is refused whole, before anything starts, by one InvalidConfig that names the value, the bound and the place.
"""

from __future__ import annotations

import difflib
import importlib
import ipaddress
import itertools
import json
import re
import socket
import types
import typing
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import psutil

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet, GatewaySpec, ModelSpec, NodeSpec, ReplicaGroup, RoutingSpec
from cluster.kv import DTYPE_BYTES, KvLayout
from cluster.placement import ReplicaPlan, WorkerPlan

MAX_CONFIG_BYTES = 2**20  # Ten thousand nodes by name are half of it.
MAX_REPLICAS = 10_000  # The largest fleet whose decisions are budgeted.
MAX_NAME_CHARS = 40  # Names become directory, actor and metric names; a Unix socket's path has 107 characters.
MAX_PORT = 65_535
TLS_FILES = ("ca.pem", "cert.pem", "key.pem")
KV_MEMORY_SHARE = 0.8  # Of the memory now available: weights, activations and the rest of the machine need the remainder.

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def read_fleet(path: Path) -> Fleet:
    """The fleet of a cluster.yaml, decoded and checked. Relative paths in it are taken from the file's own directory."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidConfig(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise InvalidConfig(f"{path}: {len(data)} bytes above {MAX_CONFIG_BYTES}, the largest config")
    try:
        fleet = parse_fleet(data, path.absolute().parent)
        check(fleet)
    except InvalidConfig as error:
        raise InvalidConfig(f"{path}: {error}") from error.__cause__
    return fleet


def parse_fleet(data: bytes, base: Path) -> Fleet:
    """Decode YAML into types, without asking whether the fleet is possible. `base`: what relative paths start from."""
    try:
        plain = msgspec.yaml.decode(data)
    except msgspec.DecodeError as error:
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
    """Raise InvalidConfig for the first thing that cannot be."""
    _check_names(fleet)
    for index, group in enumerate(fleet.replicas):
        _check_group(fleet, group, f"replicas[{index}]")
    _check_roles(fleet)
    _check_gateway(fleet.gateway)
    _check_transport(fleet)
    _check_router(fleet.routing)
    for model in fleet.models:
        _check_model(fleet, model)
    _check_memory(fleet)
    _check_port_free(fleet.gateway.host, fleet.gateway.port)


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
            elif not name:
                raise InvalidConfig(f"models[{index}].name is empty")
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
    if value < low:
        raise InvalidConfig(f"{place} {value} is below {low}")


# Replica groups


def _check_group(fleet: Fleet, group: ReplicaGroup, place: str) -> None:
    for field in ("count", "per_worker", "kv_blocks", "block_tokens", "max_running", "step_budget_tokens", "threads"):
        _check_at_least(getattr(group, field), 1, f"{place}.{field}")
    _check_at_least(MAX_REPLICAS, sum(other.count for other in fleet.replicas), "replicas: the bound on all counts together,")
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
    if group.step_budget_tokens < group.max_running:
        raise InvalidConfig(
            f"{place}.step_budget_tokens {group.step_budget_tokens} is below {place}.max_running {group.max_running}: "
            "one step could not hold every decoding request"
        )
    if group.pace is not None:
        _check_known("model shape", group.pace.shape, f"{place}.pace.shape")
        _check_known("accelerator", group.pace.accelerator, f"{place}.pace.accelerator")
        _check_at_least(group.pace.tensor_parallel, 1, f"{place}.pace.tensor_parallel")
        if not group.pace.speedup > 0:
            raise InvalidConfig(f"{place}.pace.speedup {group.pace.speedup} is not above 0")


def _check_roles(fleet: Fleet) -> None:
    for model in fleet.models:
        groups = [group for group in fleet.replicas if model_of(fleet, group) is model]
        if not any(group.role.decodes for group in groups):
            raise InvalidConfig(f"replicas: none decodes model {model.name}; give it one of role decode or mixed")


# Models and memory


def _check_model(fleet: Fleet, model: ModelSpec) -> None:
    """A path that looks like one must be a model directory; other names are left to the hub."""
    path = Path(model.path)
    if path.is_absolute() and any(group.engine == "torch" for group in fleet.replicas if model_of(fleet, group) is model):
        if not path.is_dir():
            raise InvalidConfig(f"models: {model.name}: path {path} is no directory")
        if not (path / "config.json").is_file():
            raise InvalidConfig(f"models: {model.name}: {path / 'config.json'} is missing")


def _check_memory(fleet: Fleet) -> None:
    """Refuse more KV than this machine's memory where its replicas would all run here in CPU memory.

    Models known only by hub name are not counted: their config is not here yet.
    """
    bound = int(psutil.virtual_memory().available * KV_MEMORY_SHARE)
    total = 0
    for index, group in enumerate(fleet.replicas):
        block_bytes = _block_bytes(model_of(fleet, group), group)
        total += group.count * group.kv_blocks * block_bytes
        if total > bound:
            raise InvalidConfig(
                f"replicas[{index}]: {group.count} x {group.kv_blocks} kv_blocks of {block_bytes} bytes bring the fleet's KV to "
                f"{total} bytes, above {bound}, {KV_MEMORY_SHARE:.0%} of this machine's available memory"
            )


def _block_bytes(model: ModelSpec, group: ReplicaGroup) -> int:
    path = Path(model.path) / "config.json"
    if group.engine != "torch" or group.device != "cpu" or not path.is_file():
        return 0
    layout = layout_of(path, group.dtype, group.block_tokens)
    return layout.block_bytes


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


def _check_transport(fleet: Fleet) -> None:
    transport = fleet.transport
    if transport.kv_bytes_per_s is not None and not transport.kv_bytes_per_s > 0:
        raise InvalidConfig(f"transport.kv_bytes_per_s {transport.kv_bytes_per_s} is not above 0")
    if transport.secret_file is not None and not Path(transport.secret_file).is_file():
        raise InvalidConfig(f"transport.secret_file {transport.secret_file} is no file")
    if transport.tls_dir is not None:
        for name in TLS_FILES:
            if not (Path(transport.tls_dir) / name).is_file():
                raise InvalidConfig(f"transport.tls_dir {transport.tls_dir} lacks {name}; it needs {', '.join(TLS_FILES)}")
    elif not _is_loopback(fleet.gateway.host):
        raise InvalidConfig(
            f"gateway.host {fleet.gateway.host} is no loopback address and transport.tls_dir is missing: "
            "without TLS everything stays on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_router(routing: RoutingSpec) -> None:
    module, _, name = routing.use.partition(":")
    try:
        router = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidConfig(f"routing.use {routing.use!r} cannot be imported as module:Class: {error}") from error
    try:
        router(**routing.settings)
    except (TypeError, ValueError) as error:
        raise InvalidConfig(f"routing.settings do not fit {routing.use}: {error}") from error


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
