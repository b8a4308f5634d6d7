"""What the OpenAPI description says beyond the types of answers: bodies, errors and the token."""

import dataclasses
from typing import Any

from fastapi import Depends
from fastapi.security import HTTPBearer

from recast_pl.rules import ANY_TASK

FORM, FILE, JSON, PICTURE = "multipart/form-data", "application/octet-stream", "application/json", "image/*"
"""Content types of the bodies that the server reads."""

TOKEN_VARIABLE = "RECAST_PL_TOKEN"
"""The environment variable with the secret that clients need to add and delete tasks."""

TOKEN = Depends(HTTPBearer(auto_error=False, description=f"The value of {TOKEN_VARIABLE} on the server."))
"""Describes the token; the handler checks it."""

_BINARY = {"type": "string", "format": "binary"}

_BASE64 = {"type": "string", "contentEncoding": "base64"}

_OPTIONS: dict[str, Any] = {
    "task": {"type": "string", "default": ANY_TASK},
    "top_k": {"type": "integer", "minimum": 1, "description": "How many of the most probable classes; all by default."},
}

IMAGE: dict[str, Any] = {
    FORM: {
        "type": "object",
        "required": ["image"],
        "properties": {"image": _BINARY, "images": {"type": "array", "items": _BINARY}, **_OPTIONS},
    },
    JSON: {
        "type": "object",
        "properties": {"image": _BASE64, "images": {"type": "array", "items": _BASE64}, **_OPTIONS},
    },
    PICTURE: _BINARY,
}
"""Content types and schemas of a request that classifies images."""

OPTIONS: list[dict[str, Any]] = [
    {"name": name, "in": "query", "required": False, "schema": schema} for name, schema in _OPTIONS.items()
]
"""What the address of such a request may say."""

PATCH: dict[str, Any] = {
    FILE: _BINARY,
    FORM: {
        "type": "object",
        "required": ["patch"],
        "properties": {"patch": _BINARY, "signature": _BINARY},
    },
}
"""Those of a request that adds a task: its patch alone, or with its signature."""

_FAILURES = {
    400: "The form is damaged.",
    401: "The token is missing or wrong.",
    403: "The host or the page that sent the request is not allowed, or changing tasks is off.",
    404: "There is no such task.",
    408: "The request did not arrive in time.",
    409: "There is a task of this name already, or the task is not one that was added here.",
    413: "The body has too many bytes or images, or an image too many pixels.",
    415: "The body has another content type.",
    422: "The form, an image, the patch or its signature cannot be used, or tasks cannot be found here.",
    500: "The server or the task has failed.",
    503: "Too many requests are waiting, or the server is starting; try again after the seconds in Retry-After.",
    504: "There was no answer in time.",
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task that is served, with its class names in order of label."""

    name: str
    classes: list[str]


@dataclasses.dataclass(frozen=True)
class Failure:
    """The answer to a request that fails: the problem, and what to do."""

    error: str


def body(schemas: dict[str, Any]) -> dict[str, Any]:
    """Describes the body of a request. Handlers read bodies themselves, after cheaper checks."""
    content = {content_type: {"schema": schema} for content_type, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describes the errors with these statuses, and with 403, which any request may get."""
    return {status: {"model": Failure, "description": _FAILURES[status]} for status in sorted({403, *statuses})}
