"""The OpenAPI document: bodies are msgspec structs, which FastAPI does not know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_REF = "#/components/schemas/{name}"


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(msgspec.Struct):
    error: ErrorDetail


def operation(body: type | None = None, *, keyed: bool = True) -> dict[str, Any]:
    """What an endpoint takes and answers."""
    error = {"description": "Error", "content": {"application/json": {"schema": {"$ref": _REF.format(name="ErrorAnswer")}}}}
    extra: dict[str, Any] = {"responses": {"default": error}}
    if keyed:
        extra["security"] = [{"key": []}, {}]
    if body is not None:
        reference = {"$ref": _REF.format(name=body.__name__)}
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    return extra


def describe(app: FastAPI, bodies: Sequence[type]) -> Callable[[], dict[str, Any]]:
    """What FastAPI calls for the document; made once."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, schemas = msgspec.json.schema_components([*bodies, ErrorAnswer], ref_template=_REF)
            components = made.setdefault("components", {})
            components.setdefault("schemas", {}).update(schemas)
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = made
        return app.openapi_schema

    return document
