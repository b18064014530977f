"""Whether this machine can run a local fleet: memory, devices, files, ports, and programs beside it."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections import Counter
from pathlib import Path

import psutil

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet, ModelSpec, ReplicaGroup
from cluster.kv import DTYPE_BYTES, KvLayout
from cluster.placement import limits_of, slots_of
from controller.config.groups import model_of, nodes_of

MEMORY_SHARE = 0.8  # Of the memory there is for weights and KV: activations and the rest of the machine need the remainder.


def check_this_machine(fleet: Fleet, *, running: bool = False) -> None:
    """All nodes of a local Ray are this machine. `running`: the fleet itself has taken the memory and the ports."""
    _check_devices(fleet)
    if fleet.gateway.request_log:
        _check_writable(Path(fleet.gateway.request_log), "gateway.request_log")
    if fleet.telemetry.local_prometheus and shutil.which("prometheus") is None:
        raise InvalidConfig(
            "telemetry.local_prometheus true: there is no program `prometheus` on the PATH; `apt-get install prometheus` brings it"
        )
    if running:
        return
    _check_memory(fleet)
    _check_port_free(fleet.gateway.host, fleet.gateway.port, "gateway.port")
    if fleet.control.http_port:
        _check_port_free("127.0.0.1", fleet.control.http_port, "control.http_port")


def memory_by_node(fleet: Fleet) -> Counter[str]:
    """Bytes of main memory for each node's even share of the weights and KV that its pool may host; more while they load."""
    pools: Counter[str] = Counter()
    for group in fleet.replicas:
        pools[group.pool] += _most(fleet, group) * _replica_bytes(fleet, group)
    return Counter({node.name: pools[node.pool] // len(nodes_of(fleet, node.pool)) for node in fleet.nodes})


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


def _check_memory(fleet: Fleet) -> None:
    """Refuse more weights and KV than there is memory for, once every group has as many replicas as it may have."""
    bound = int(psutil.virtual_memory().available * MEMORY_SHARE)
    total = 0
    for index, group in enumerate(fleet.replicas):
        kv, weights = _kv_bytes(model_of(fleet, group), group), _weight_bytes(model_of(fleet, group), group)
        most = _most(fleet, group)
        total += most * (kv + weights)
        if total > bound:
            raise InvalidConfig(
                f"replicas[{index}]: {most} x ({group.kv_blocks} kv_blocks, {kv} bytes, and {weights} of weights) bring the "
                f"fleet to {total} bytes, above {bound}, {MEMORY_SHARE:.0%} of this machine's available memory"
            )


def _most(fleet: Fleet, group: ReplicaGroup) -> int:
    return min(limits_of(group)[1], sum(slots_of(fleet, node) for node in nodes_of(fleet, group.pool)))


def _replica_bytes(fleet: Fleet, group: ReplicaGroup) -> int:
    model = model_of(fleet, group)
    return _kv_bytes(model, group) + _weight_bytes(model, group)


def _check_devices(fleet: Fleet) -> None:
    """Refuse CUDA where there is none."""
    for index, group in enumerate(fleet.replicas):
        if group.engine == "torch" and group.device != "cpu":
            import torch  # Takes seconds, which a fleet on CPU need not wait for.

            if not torch.cuda.is_available():
                raise InvalidConfig(f"replicas[{index}].device {group.device}: there is no CUDA device on this machine")


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


def _check_writable(directory: Path, place: str) -> None:
    """A directory that is there, or can be made."""
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    if not nearest.is_dir():
        raise InvalidConfig(f"{place} {directory}: {nearest} is no directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InvalidConfig(f"{place} {directory}: {nearest} cannot be written to")


def _check_port_free(host: str, port: int, place: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InvalidConfig(f"{place} {port} on {host} cannot be had: {error.strerror}") from error
