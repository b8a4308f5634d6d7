"""Files that are either whole or absent: atomic writing, safetensors with metadata, fingerprints."""

import errno
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

from recast_pl.errors import RecastError, StorageError

STORAGE_FAULTS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
)
"""What the system says where a file cannot be written, and the user can mend."""

_PART = ".part"  # ends the name of what is being written

_METADATA_KEY = "recast_pl"  # one key, because safetensors keeps several in no fixed order


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part.

    Args:
        path: The file; its folder is created.
        content: Bytes, or text to be encoded as UTF-8.

    Raises:
        StorageError: If the disk is full or must not be written; the old content stays.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says, of a file or folder that cannot be written, which and why.

    Args:
        path: The file or folder.

    Raises:
        StorageError: Where the system refuses to write what is written within.
    """
    try:
        yield
    except OSError as cause:
        if cause.errno not in STORAGE_FAULTS:
            raise
        raise StorageError(
            f"cannot write {path} ({cause}); make room or give the right to write there, or choose another "
            "folder; what is finished is kept"
        ) from cause


def remove_unfinished(folder: Path) -> None:
    """Removes what `write_atomic` was writing below a folder when it was killed; no one else may write there."""
    for part in folder.rglob(f".*{_PART}"):
        part.unlink(missing_ok=True)


def json_text(content: Any) -> str:
    """Indented JSON for a file; NaN is refused, because JSON has none."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def read_json(path: Path, error: type[RecastError], **entries: type) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
        path: The file.
        error: The type of error to raise.
        entries: The type of each entry that it must have.

    Raises:
        RecastError: (as `error`) if the file is missing or damaged, or lacks an entry.
    """
    try:
        content = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as cause:
        raise error(f"cannot read {path} ({cause}); restore it") from cause
    wrong = [name for name, kind in entries.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise error(f"{path} is damaged ({wrong[0]} is missing or no {entries[wrong[0]].__name__}); restore it")
    return content


def sealed_json(content: Mapping[str, Any]) -> str:
    """JSON for a file, with a checksum of what it says."""
    return json_text({**content, "checksum": sha256(_json(content).encode())})


def read_sealed_json(path: Path, error: type[RecastError]) -> dict[str, Any]:
    """Reads a file of `sealed_json`.

    Args:
        path: The file.
        error: The type of error to raise.

    Raises:
        RecastError: (as `error`) if the file is missing or says something else than was written.
    """
    content = read_json(path, error)
    checksum = content.pop("checksum", None)
    if checksum != sha256(_json(content).encode()):
        raise error(f"{path} is damaged (its checksum does not fit); restore it")
    return content


def sha256(content: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(content).hexdigest()


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
    return sha256(f"{_json(metadata)}\n{fingerprint(tensors)}".encode())


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
