"""Pipelines as the config names them: classes by import path, their fields as settings. There is no registry of policies."""

from __future__ import annotations

from typing import Any

import msgspec

from cluster.errors import InvalidConfig
from cluster.fleet import PipelineSpec, PolicySpec
from policies.expansion import Expansion
from policies.import_path import import_class
from policies.pipeline import Pipeline


def build(spec: PipelineSpec, place: str = "control") -> Pipeline:
    """Raises InvalidConfig for what cannot be imported or set, with its place in the file."""
    return Pipeline(
        policies=tuple(_load(one, "decide", f"{place}.policies[{index}]") for index, one in enumerate(spec.policies)),
        guards=tuple(_load(one, "limit", f"{place}.guards[{index}]") for index, one in enumerate(spec.guards)),
        expansion=_settled(Expansion, spec.expansion, f"{place}.expansion"),
    )


def as_text(spec: PipelineSpec) -> str:
    """The one text that stands for a spec, defaults of its classes included: what a journal keeps."""
    pipeline = build(spec)
    effective = PipelineSpec(
        policies=_effective(spec.policies, pipeline.policies),
        guards=_effective(spec.guards, pipeline.guards),
        expansion=msgspec.to_builtins(pipeline.expansion),
    )
    return msgspec.json.encode(effective, order="deterministic").decode()


def from_text(text: str) -> Pipeline:
    """The pipeline that a journal's text stands for. Raises InvalidConfig where this release cannot make it."""
    try:
        spec = msgspec.json.decode(text, type=PipelineSpec)
    except msgspec.ValidationError as error:
        raise InvalidConfig(f"journal: its pipeline is of another release: {error}") from error
    return build(spec, "journal")


def _effective(specs: tuple[PolicySpec, ...], built: tuple[Any, ...]) -> tuple[PolicySpec, ...]:
    return tuple(PolicySpec(use=spec.use, settings=msgspec.to_builtins(one)) for spec, one in zip(specs, built, strict=True))


def _load(spec: PolicySpec, method: str, place: str) -> Any:
    kind = import_class(spec.use, place=place)
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct) and callable(getattr(kind, method, None))):
        raise InvalidConfig(f"{place}.use {spec.use!r} is no msgspec.Struct with a method `{method}`")
    return _settled(kind, spec.settings, f"{place}.settings")


def _settled(kind: type[Any], settings: dict[str, Any], place: str) -> Any:
    try:
        return msgspec.convert(settings, kind)
    except msgspec.ValidationError as error:
        raise InvalidConfig(f"{place}: {' '.join(str(error).split())}") from error
