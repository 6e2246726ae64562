"""Renders every error in OpenAI's shape, in one place."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError, TimeoutError
from starlette.exceptions import HTTPException

from zenray.spec.errors import Conflict, InvalidRequest, InvalidValue, NotFound, Unavailable, UnknownField, ZenrayError

logger = logging.getLogger(__name__)


class MethodNotAllowed(InvalidRequest):
    code, status = "method_not_allowed", 405


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ZenrayError, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    for unanswered in (OperationalError, InterfaceError, TimeoutError):
        app.add_exception_handler(unanswered, _database)
    app.add_exception_handler(IntegrityError, _raced)
    app.add_exception_handler(Exception, _unexpected)


def render(error: ZenrayError) -> JSONResponse:
    return JSONResponse(error.to_openai(), status_code=error.status, headers=error.headers())


async def _known(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ZenrayError)
    return render(error)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return render(explain(error.errors(), _body_model(request)))


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return render(MethodNotAllowed(f"{request.url.path} does not take {request.method}."))
    if error.status_code == 404:
        return render(NotFound(f"There is nothing at {request.url.path}.", hint="The routes are listed at /docs."))
    return render(InvalidRequest(str(error.detail)))


async def _database(_request: Request, error: Exception) -> JSONResponse:
    """Away, full, locked for too long, or a deadlock: nothing was written, and the same request may be sent again."""
    logger.error("the database refused: %s", error)
    return render(Unavailable("The database cannot answer now.", hint="Send the request again.", retry_after_s=1))


async def _raced(request: Request, error: Exception) -> JSONResponse:
    """Two made the same thing at the same moment on PostgreSQL; the other one was first."""
    logger.info("%s %s lost a race: %s", request.method, request.url.path, type(error).__name__)
    return render(Conflict("Somebody else has just made the same thing.", hint="Look, or send the request again."))


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return render(ZenrayError("Something failed inside control.", hint="Its log says what."))


def explain(items: Iterable[Any], body: type[BaseModel] | None) -> ZenrayError:
    """One of pydantic's errors in words. An unknown field first: it explains why another one is missing."""
    item = min(items, key=lambda item: item["type"] != "extra_forbidden")
    path = [part for part in item["loc"] if part not in ("body", "query", "path", "header")]
    name = ".".join(str(part) for part in path)
    if item["type"] == "json_invalid":
        return InvalidRequest(f"The body is not valid JSON: {item.get('ctx', {}).get('error', item['msg'])}.")
    if item["type"] == "extra_forbidden":
        known = _fields_at(body, path[:-1])
        near = get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known fields: {', '.join(sorted(known))}."
        return UnknownField(f"Unknown field {name!r}.", hint=hint, param=name)
    if not path and item["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return InvalidRequest("The body is not a JSON object.", hint="Send one, with content-type: application/json.")
    if item["type"] == "missing":
        return InvalidRequest(f"{name or 'The body'} is missing.", param=name or None)
    return InvalidValue(f"{name or 'The body'}: {item['msg']}.", param=name or None)


def _body_model(request: Request) -> type[BaseModel] | None:
    field = getattr(request.scope.get("route"), "body_field", None)
    return _model_in(field.field_info.annotation) if field is not None else None


def _fields_at(model: type[BaseModel] | None, path: list[Any]) -> list[str]:
    for part in path:
        if isinstance(part, str) and model is not None and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation)
    return list(model.model_fields) if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, getattr(annotation, "__args__", ()))), None)
