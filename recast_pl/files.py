"""Files that are either whole or absent: atomic writing, safetensors with metadata, fingerprints."""

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from recast_pl.errors import RecastError

_METADATA_KEY = "recast_pl"  # one key, because safetensors keeps several in no fixed order


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part.

    Args:
        path: The file; its folder is created.
        content: Bytes, or text to be encoded as UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def json_text(content: Any) -> str:
    """Indented JSON for a file; NaN is refused, because JSON has none."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def read_json(path: Path, error: type[RecastError]) -> Any:
    """Reads a JSON file.

    Raises:
        RecastError: (as `error`) if the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as cause:
        raise error(f"cannot read {path} ({cause}); restore it") from cause


def pack_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """The bytes of a safetensors file with a checksum; equal content gives equal bytes.

    Args:
        tensors: Tensors by name, of any device and layout.
        metadata: Anything JSON can hold.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    whole = {**metadata, "checksum": _checksum(contiguous, metadata)}
    return save(contiguous, metadata={_METADATA_KEY: _json(whole)})


def read_tensors(path: str | Path, error: type[RecastError]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file of `pack_tensors`.

    Args:
        path: The file.
        error: The type of error to raise.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        RecastError: (as `error`) if the file is missing, damaged or from another program.
    """
    path = Path(path)
    if not path.is_file():
        raise error(f"{path} does not exist; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(json.loads((file.metadata() or {})[_METADATA_KEY]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        whole = metadata.pop("checksum") == _checksum(tensors, metadata)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as cause:
        raise error(f"{path} is damaged or was not written by recast_pl ({cause}); write it anew") from cause
    if not whole:
        raise error(f"{path} is damaged (its checksum is wrong); write it anew")
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{_json(metadata)}\n{fingerprint(tensors)}".encode()).hexdigest()


def _json(content: Any) -> str:
    return json.dumps(content, sort_keys=True, allow_nan=False)


def is_whole_checkpoint(path: Path) -> bool:
    """Whether a checkpoint can be read, and every part of it is as it was written, by its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            # testzip does not look at these two, and torch would load rubbish from a member of wrong size, or a folder
            members = archive.infolist()
            stored = all(m.compress_size == m.file_size and not m.external_attr for m in members)
            whole = stored and archive.testzip() is None
        if whole:
            torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return False
    return whole


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Lets one process in at a time; others are told what they wait for.

    Args:
        path: The lock file.
        what: What is being done, for the message.

    Raises:
        OSError: If the lock file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        Console(stderr=True).print(f"waiting for another process: {what}", highlight=False)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bits of tensors, in order of name.

    Args:
        tensors: Tensors by name, of any device.

    Returns:
        64 hexadecimal digits, equal for equal tensors on every machine.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(np.ascontiguousarray(flat.view(torch.uint8).numpy()).data)
    return digest.hexdigest()
