"""The gateway's OpenAPI document, made from the tables that requests are checked with, and a page that shows it."""

from __future__ import annotations

import html
from functools import cache
from typing import Any

from zenray import __version__
from zenray.spec.openai import CHAT, COMPLETION, Shape

_JSON = "application/json"
_ERRORS = {
    "400": "A field is unknown or has an impossible value, or the context is too small.",
    "401": "No key, or one that is unknown, revoked or expired.",
    "403": "The key's scopes do not cover the model.",
    "404": "No such model.",
    "413": "The body is too large.",
    "429": "The organisation's credit does not cover the request (insufficient_quota).",
    "502": "The model's replica failed.",
    "503": "The model is not ready, overloaded, or the gateway is cut off.",
}


@cache
def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "zenray gateway",
            "version": __version__,
            "description": "OpenAI-compatible: the official clients work with this server's /v1 as their base URL.",
        },
        "paths": {
            "/v1/chat/completions": _question("Answer a conversation", CHAT, "createChatCompletion"),
            "/v1/completions": _question("Continue a text", COMPLETION, "createCompletion"),
            "/v1/models": {"get": _get("The models that the key may name", "listModels", "ModelList")},
            "/v1/models/{model}": {
                "get": _get("One model", "retrieveModel", "Model", errors=("401", "404", "503"))
                | {"parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]}
            },
            "/healthz": {"get": _get("200 while the process runs", "healthz", None, errors=())},
            "/readyz": {"get": _get("200 while questions are answered", "readyz", None, errors=("503",))},
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "summary": "Numbers for Prometheus",
                    "security": [],
                    "responses": {"200": {"description": "Text", "content": {"text/plain": {}}}},
                }
            },
        },
        "components": {"schemas": _schemas(), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{"key": []}],
    }


def _question(summary: str, shape: Shape, operation: str) -> dict[str, Any]:
    answer = {_JSON: {"schema": {"type": "object"}}, "text/event-stream": {"schema": {"type": "string"}}}
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "requestBody": {"required": True, "content": {_JSON: {"schema": shape.schema()}}},
            "responses": {
                "200": {"description": "The answer: whole, or with `stream` as server-sent events", "content": answer}
            }
            | _errors(tuple(_ERRORS)),
        }
    }


def _get(summary: str, operation: str, schema: str | None, errors: tuple[str, ...] = ("401", "503")) -> dict[str, Any]:
    answer = {"$ref": f"#/components/schemas/{schema}"} if schema else {"type": "object"}
    route: dict[str, Any] = {
        "operationId": operation,
        "summary": summary,
        "responses": {"200": {"description": summary, "content": {_JSON: {"schema": answer}}}} | _errors(errors),
    }
    return route if schema else route | {"security": []}


def _errors(statuses: tuple[str, ...]) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Error"}
    return {status: {"description": _ERRORS[status], "content": {_JSON: {"schema": schema}}} for status in statuses}


def _schemas() -> dict[str, Any]:
    text_or_null = {"type": ["string", "null"]}
    model = {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": {"type": "string"},
        },
        "required": ["id", "object", "created", "owned_by"],
    }
    error = {
        "type": "object",
        "properties": {
            "message": {"type": "string"},
            "type": {"type": "string"},
            "param": text_or_null,
            "code": text_or_null,
        },
        "required": ["message", "type", "param", "code"],
    }
    return {
        "Model": model,
        "ModelList": {
            "type": "object",
            "properties": {
                "object": {"const": "list"},
                "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
            },
            "required": ["object", "data"],
        },
        "Error": {"type": "object", "properties": {"error": error}, "required": ["error"]},
    }


@cache
def page() -> bytes:
    """A page of the routes and their fields, without a script or anything from elsewhere."""
    sections = []
    for path, methods in openapi()["paths"].items():
        for method, route in methods.items():
            body = route.get("requestBody", {}).get("content", {}).get(_JSON, {}).get("schema")
            sections.append(
                f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(route['summary'])}</p>"
                + (_fields(body) if body else "")
                + _answers(route["responses"])
            )
    text = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<title>zenray gateway</title><style>"
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{border-bottom:1px solid #ccc;padding:.2rem .8rem;text-align:left;"
        "vertical-align:top}code{font-size:.95em}</style>"
        "<h1>zenray gateway</h1><p>OpenAI-compatible. The machine-readable form is "
        "<a href=/openapi.json>/openapi.json</a>.</p>" + "".join(sections) + "</html>"
    )
    return text.encode()


def _fields(schema: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code>{' (required)' if name in schema['required'] else ''}</td>"
        f"<td>{html.escape(_in_words(field))}</td></tr>"
        for name, field in sorted(schema["properties"].items())
    )
    return f"<table><tr><th>Field</th><th>Value</th></tr>{rows}</table>"


def _answers(responses: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{status}</td><td>{html.escape(answer['description'])}</td></tr>"
        for status, answer in responses.items()
    )
    return f"<table><tr><th>Status</th><th>Meaning</th></tr>{rows}</table>"


def _in_words(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(str(value) for value in schema["enum"])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(_in_words(one) for one in schema[union]))
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_in_words(schema['items'])}"
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        return f"{kind} from {low:g} to {high:g}"
    return f"{kind} of at least {low:g}" if low is not None else kind
