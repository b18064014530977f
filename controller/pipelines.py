"""Pipelines as the config names them: classes by import path, their fields as settings. There is no registry of policies."""

from __future__ import annotations

from typing import Any

import msgspec

from cluster.errors import InvalidConfig
from cluster.fleet import PipelineSpec, PolicySpec
from controller.spelling import check_spelling
from policies.expansion import Expansion
from policies.import_path import import_class
from policies.pipeline import Pipeline


def build(spec: PipelineSpec, place: str = "control.pipeline") -> Pipeline:
    """Raises InvalidConfig for what cannot be imported or set, with its place in the file."""
    return Pipeline(
        policies=tuple(_load(one, "decide", f"{place}.policies[{index}]") for index, one in enumerate(spec.policies)),
        guards=tuple(_load(one, "limit", f"{place}.guards[{index}]") for index, one in enumerate(spec.guards)),
        expansion=_settled(Expansion, spec.expansion, f"{place}.expansion"),
    )


def as_text(spec: PipelineSpec) -> str:
    """The one text that stands for a spec, defaults of its classes included: what a journal keeps."""
    return msgspec.json.encode(spelled_out(spec), order="deterministic").decode()


def spelled_out(spec: PipelineSpec, place: str = "control.pipeline") -> PipelineSpec:
    """The same with every field of its classes, of plain types as a file has them. Raises InvalidConfig as `build` does."""
    pipeline = build(spec, place)
    return PipelineSpec(
        policies=_effective(spec.policies, pipeline.policies),
        guards=_effective(spec.guards, pipeline.guards),
        expansion=_plain(pipeline.expansion),
    )


def from_text(text: str) -> Pipeline:
    """The pipeline that a journal's text stands for. Raises InvalidConfig where this release cannot make it."""
    try:
        spec = msgspec.json.decode(text, type=PipelineSpec)
    except msgspec.ValidationError as error:
        raise InvalidConfig(f"journal: its pipeline is of another release: {error}") from error
    return build(spec, "journal")


def _effective(specs: tuple[PolicySpec, ...], built: tuple[Any, ...]) -> tuple[PolicySpec, ...]:
    return tuple(PolicySpec(use=spec.use, settings=_plain(one)) for spec, one in zip(specs, built, strict=True))


def _plain(built: Any) -> Any:
    """Lists for tuples, as a file has them."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(built))


def _load(spec: PolicySpec, method: str, place: str) -> Any:
    kind = import_class(spec.use, place=place)
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct) and callable(getattr(kind, method, None))):
        raise InvalidConfig(f"{place}.use {spec.use!r} is no msgspec.Struct with a method `{method}`")
    if method == "decide" and not hasattr(kind, "emergency"):
        raise InvalidConfig(
            f"{place}.use {spec.use!r} does not say whether it is for emergencies: it needs a field `emergency: bool`"
        )
    return _settled(kind, spec.settings, f"{place}.settings")


def _settled(kind: type[Any], settings: dict[str, Any], place: str) -> Any:
    try:
        check_spelling(settings, kind, place)
        return msgspec.convert(settings, kind)
    except msgspec.ValidationError as error:
        fault, _, within = " ".join(str(error).split()).partition(" - at `$")
        raise InvalidConfig(f"{place}{within.removesuffix('`')}: {fault}") from error
    except (TypeError, NameError) as error:
        raise InvalidConfig(f"{place}: fields of {kind.__name__} cannot be set by a config: {error}") from error
