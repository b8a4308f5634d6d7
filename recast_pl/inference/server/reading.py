"""Reads the images of a request: from a form, from JSON, or the body itself."""

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from recast_pl.inference.server.schema import FORM, JSON, PICTURE
from recast_pl.rules import ANY_TASK

MOST_IMAGES = 32
"""Images that one request may have."""

_MOST_TEXT = 4096  # bytes of a field of a form that is not a file

Field = TypeVar("Field", str, UploadFile)


@dataclass(frozen=True)
class Question:
    """What a client asks.

    Args:
        images: Image files.
        task: Name of the task, or `auto`.
        top_k: How many of the most probable classes are wanted; None for all.
        several: Whether the answer is a list, in the order of the images.
    """

    images: list[bytes]
    task: str
    top_k: int | None
    several: bool


async def read_question(request: Request) -> Question:
    """Reads the body of a request, and `task` and `top_k` from its address if the body does not have them.

    Raises:
        HTTPException: If it cannot be read, with a status that tells why.
    """
    kind = check_type(request, FORM, JSON, PICTURE)
    options: dict[str, Any] = {name: request.query_params[name] for name in request.query_params}
    several = False
    if kind == FORM:
        async with request.form(max_files=MOST_IMAGES, max_fields=8, max_part_size=_MOST_TEXT) as form:
            options |= {name: single_field(form, name, str) for name in ("task", "top_k") if name in form}
            files = _files(form)
            images, several = [await file.read() for file in files], "images" in form or len(files) > 1
    elif kind == JSON:
        values = await run_in_threadpool(_parse, await request.body())
        options |= {name: values[name] for name in ("task", "top_k") if name in values}
        several = "images" in values
        images = await run_in_threadpool(_decode_all, values["images"] if several else [values.get("image")])
    else:
        images = [await request.body()]
    return Question(images, _task(options.get("task", ANY_TASK)), _count(options.get("top_k")), several)


def check_type(request: Request, *wanted: str) -> str:
    """The entry of `wanted`, such as `image/*`, that the content type of a body fits; raises HTTPException if none."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    for kind in wanted:
        if given == kind or (kind.endswith("/*") and given.startswith(kind[:-1])):
            return kind
    either = " or ".join(wanted)
    raise HTTPException(415, f"the body has {given[:80] or 'no content type'}; send it with Content-Type: {either}")


def single_field(form: FormData, name: str, kind: type[Field]) -> Field:
    """The value of a field that a form must have exactly once."""
    values = form.getlist(name)
    if len(values) != 1 or not isinstance(values[0], kind):
        wanted = "text" if kind is str else "a file"
        raise HTTPException(422, f"the form has {len(values)} fields {name!r}; send one, with {wanted}")
    return values[0]


def _files(form: FormData) -> list[UploadFile]:
    """The fields `image` or `images` of a form."""
    name = "images" if "images" in form else "image"
    values = form.getlist(name)
    files = [value for value in values if isinstance(value, UploadFile)]
    if not files or len(files) < len(values) or {"image", "images"} <= set(form):
        raise HTTPException(422, f"the form has {len(values)} fields {name!r}, not all with a file; send 'image' once")
    return files


def _parse(body: bytes) -> dict[str, Any]:
    """The object that a JSON body must be."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as cause:
        raise HTTPException(422, "the body is not JSON; send an object with 'image' or 'images' in base64") from cause
    if not isinstance(values, dict) or len({"image", "images"} & values.keys()) != 1:
        raise HTTPException(422, "the body needs either 'image' or 'images', in base64")
    return values


def _decode_all(texts: Any) -> list[bytes]:
    """The files that a list of base64 texts, or `data:` addresses, holds."""
    if not isinstance(texts, list) or not texts:
        raise HTTPException(422, "'images' must be a list of texts in base64, with at least one")
    if len(texts) > MOST_IMAGES:
        raise HTTPException(413, f"the request has {len(texts)} images; send at most {MOST_IMAGES}")
    return [_decode(text) for text in texts]


def _decode(text: Any) -> bytes:
    try:
        return base64.b64decode(text.rpartition(",")[2] if text.startswith("data:") else text, validate=True)
    except (AttributeError, ValueError, binascii.Error) as cause:
        raise HTTPException(422, "an image is not a text in base64; encode its file so") from cause


def _task(value: Any) -> str:
    if not isinstance(value, str):
        raise HTTPException(422, f"task must be a text, such as {ANY_TASK!r}")
    return value


def _count(value: Any) -> int | None:
    """The value of `top_k`, which is text in forms and addresses."""
    if value is None:
        return None
    digits = str(value) if type(value) is int else value
    if isinstance(digits, str) and re.fullmatch("[0-9]{1,9}", digits) and int(digits) > 0:
        return int(digits)
    raise HTTPException(422, f"top_k is {str(value)[:80]!r}; give a whole number above 0")
