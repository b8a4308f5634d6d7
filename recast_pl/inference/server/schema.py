"""What the OpenAPI description says beyond the types of answers: bodies, errors and the token."""

import dataclasses
from typing import Any

from fastapi import Depends
from fastapi.security import HTTPBearer

from recast_pl.rules import ANY_TASK

FORM, FILE = "multipart/form-data", "application/octet-stream"
"""Content types of the bodies that the server reads."""

TOKEN_VARIABLE = "RECAST_PL_TOKEN"
"""The environment variable with the secret that clients need to add tasks."""

TOKEN = Depends(HTTPBearer(auto_error=False, description=f"The value of {TOKEN_VARIABLE} on the server."))
"""Describes the token; the handler checks it."""

_BINARY = {"type": "string", "format": "binary"}

IMAGE: dict[str, Any] = {
    FORM: {
        "type": "object",
        "required": ["image"],
        "properties": {"image": _BINARY, "task": {"type": "string", "default": ANY_TASK}},
    }
}
"""Content types and schemas of a request that classifies an image."""

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
    403: "The host or the page that sent the request is not allowed, or adding tasks is off.",
    404: "There is no such task.",
    408: "The request did not arrive in time.",
    409: "There is a task of this name already.",
    413: "The body has too many bytes, or the image too many pixels.",
    415: "The body has another content type.",
    422: "The form, the image, the patch or its signature cannot be used, or tasks cannot be found here.",
    500: "The server or the task has failed.",
    503: "Too many requests are waiting; try again after the seconds in Retry-After.",
    504: "There was no answer in time.",
}


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
