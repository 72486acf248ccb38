"""The API's description (OpenAPI 3.1), made from the routes and the types they use.

Nothing is written twice: a route or a field that changes, changes here by itself.
"""

import re
from typing import Any

import msgspec
from msgspec import Struct

from accounting.contract.errors import (
    BodyTooLarge,
    Failure,
    IdempotencyInProgress,
    IdempotencyMismatch,
    InvalidKey,
    InvalidRequest,
    NotFound,
    RequestTimeout,
    ScopeMissing,
    Unavailable,
)
from admin_api import payloads
from admin_api.idempotency import HEADER, PARAMETER
from admin_api.routes import HEALTHZ, OPENAPI, ROUTES, Caller, Route

_JSON = "application/json"
_SCHEMES = {Caller.OPERATOR: "operatorToken", Caller.KEY: "apiKey"}


class ErrorDetails(Struct, kw_only=True):
    """`code` is stable and meant for programs; `param` names the parameter at fault."""

    message: str
    type: str
    param: str | None
    code: str
    request_id: str
    metadata: dict[str, Any] = {}


class Error(Struct):
    error: ErrorDetails


def document() -> bytes:
    """The description as JSON."""
    kinds = {route.body for route in ROUTES} | {route.answer for route in ROUTES} | {Error}
    _, schemas = msgspec.json.schema_components(
        sorted(kinds, key=lambda kind: kind.__name__),
        schema_hook=payloads.schema_of,
        ref_template="#/components/schemas/{name}",
    )
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "Tollgate account and operator API", "version": "1"},
            "paths": _paths(),
            "components": {
                "schemas": schemas,
                "securitySchemes": {
                    "operatorToken": {"type": "http", "scheme": "bearer"},
                    "apiKey": {"type": "http", "scheme": "bearer", "bearerFormat": "inf_…"},
                },
            },
        }
    )


def _paths() -> dict[str, dict[str, Any]]:
    paths: dict[str, dict[str, Any]] = {
        OPENAPI: {"get": _public("This description.")},
        HEALTHZ: {"get": _public("The process answers.")},
    }
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return paths


def _public(summary: str) -> dict[str, Any]:
    answer = {"description": summary, "content": {_JSON: {"schema": {"type": "object"}}}}
    return {"summary": summary, "security": [], "responses": {"200": answer}}


def _operation(route: Route) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.operation,
        "summary": route.summary,
        "security": [{_SCHEMES[route.caller]: []}],
        "parameters": _parameters(route),
        "responses": _responses(route),
    }
    if route.mutates:
        required = any(field.required for field in msgspec.structs.fields(route.body))
        operation["requestBody"] = {"required": required, "content": _content(route.body)}
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    text = {"type": "string"}
    found: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": text}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    key = {"type": "string", "minLength": 1, "maxLength": 255}
    if route.mutates:
        found.append({"name": HEADER, "in": "header", "schema": key})
    if route.method == "DELETE":
        found.append({"name": PARAMETER, "in": "query", "schema": key})
    return found


def _responses(route: Route) -> dict[str, Any]:
    success = {"description": route.summary, "content": _content(route.answer)}
    responses: dict[str, Any] = {str(route.status): success}
    by_status: dict[int, list[str]] = {}
    for failure in _failures(route):
        by_status.setdefault(failure.status, []).append(f"`{failure.code}`: {failure.message}")
    for status, texts in sorted(by_status.items()):
        responses[str(status)] = {"description": " ".join(texts), "content": _content(Error)}
    return responses


def _failures(route: Route) -> list[type[Failure]]:
    found: list[type[Failure]] = [InvalidKey, Unavailable, Failure]
    if route.caller is Caller.KEY:
        found.append(ScopeMissing)
    if "{" in route.path:
        found.append(NotFound)
    if route.mutates:
        found += [InvalidRequest, RequestTimeout, BodyTooLarge]
        found += [IdempotencyInProgress, IdempotencyMismatch]
    return found


def _content(kind: type[Struct]) -> dict[str, Any]:
    return {_JSON: {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
