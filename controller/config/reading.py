"""From a file to a Fleet: YAML decoded into types, with the words of the file in every error."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from cluster.errors import InvalidConfig
from cluster.fleet import Fleet
from controller.spelling import check_spelling

MAX_CONFIG_BYTES = 2**20  # Ten thousand nodes by name are half of it.
MAX_SHOWN_CHARS = 60  # Of a wrong value.

Settings = TypeVar("Settings", bound=msgspec.Struct)


def load_fleet(path: Path) -> Fleet:
    """The fleet of a cluster.yaml, decoded. Relative paths in it are taken from the file's own directory."""
    data = read_config(path)
    with named(path):
        return parse_fleet(data, path.absolute().parent)


def read_config(path: Path) -> bytes:
    """A file of settings, as it is. Raises InvalidConfig naming it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidConfig(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise InvalidConfig(f"{path}: {len(data)} bytes above {MAX_CONFIG_BYTES}, the largest config")
    return data


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """A config's error with the name of its file."""
    try:
        yield
    except InvalidConfig as error:
        raise InvalidConfig(f"{path}: {error}") from error.__cause__


def parse_fleet(data: bytes, base: Path) -> Fleet:
    """Decode YAML into types, without asking whether the fleet is possible. `base`: what relative paths start from."""
    return _with_absolute_paths(decoded(data, Fleet), base)


def decoded(data: bytes, kind: type[Settings]) -> Settings:
    """YAML as a struct of settings. Raises InvalidConfig with the value and its place."""
    try:
        plain = yaml.load(data, _Yaml)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InvalidConfig(f"is no YAML: {_one_line(error)}") from error
    if not isinstance(plain, dict):
        raise InvalidConfig(f"holds {type(plain).__name__}, not a mapping of settings")
    check_spelling(plain, kind, "")
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        raise InvalidConfig(_with_value(_one_line(error).replace("$.", ""), plain)) from error


class _Yaml(yaml.CSafeLoader):
    """Plain YAML in which a key given twice is an error, not silently its last value, and 18:30 is a time of day, not 1110."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        for key, times in keys.items():
            if times > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key `{key}` is given {times} times", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int | str:
        return node.value if ":" in node.value else super().construct_yaml_int(node)


_Yaml.add_constructor("tag:yaml.org,2002:int", _Yaml.construct_yaml_int)


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


def _with_value(said: str, plain: object) -> str:
    """What is wrong with a value, its place first and the value with it: msgspec tells its type alone."""
    found = re.fullmatch(r"(.*) - at `([^`]+)`", said)
    if found is None:
        return said
    value: Any = plain
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", found[2]):
        try:
            value = value[int(index)] if index else value[key]
        except (LookupError, TypeError):  # A mapping's any key is `[...]`.
            return f"{found[2]}: {found[1]}"
    shown = repr(value)
    cut = shown if len(shown) <= MAX_SHOWN_CHARS else f"{shown[:MAX_SHOWN_CHARS]}..."
    return f"{found[2]} {cut}: {found[1]}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
